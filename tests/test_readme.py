"""What the README says is run, so that it stays true."""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cipo_jax import config
from cipo_jax.data.examples import Example

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def loss_blocks():
    return [block for block in python_blocks() if "losses." in block]


def test_the_losses_snippets_run_and_print_what_they_say():
    # The second goes on where the first ends.
    snippets = [block for block in loss_blocks() if not re.search("nnx|eqx", block)]
    assert len(snippets) == 2
    printed = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], capture_output=True, text=True, check=True
    ).stdout
    loss, margin, kl = map(float, printed.split())
    assert abs(loss - 0.6931472) < 1e-6
    assert margin == 0.0
    # Half of the 32 logits are 1, the others 0; the frozen model's are all 0.
    total = 16 * math.e + 16
    assert abs(kl - (math.log(total / 32) - 0.5)) < 1e-6


@pytest.mark.parametrize(
    ("library", "at_the_reference", "metric_falls"),
    # NPO with beta 0.1, of what is forgotten; DPO, of a margin.
    [("flax import nnx", 20 * math.log(2), True), ("equinox as eqx", math.log(2), False)],
)
def test_the_losses_snippets_for_model_objects_learn(
    capsys, library, at_the_reference, metric_falls
):
    (snippet,) = [block for block in loss_blocks() if library in block]
    exec(snippet, {"__name__": "snippet"})
    rows = [tuple(map(float, line.split())) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3
    assert abs(rows[0][0] - at_the_reference) < 1e-5 * at_the_reference
    assert rows[0][1] == 0.0
    for (before, metric_before), (after, metric_after) in itertools.pairwise(rows):
        assert after < before
        assert (metric_after < metric_before) == metric_falls


def test_the_config_example_is_a_valid_config():
    (snippet,) = [block for block in python_blocks() if "def get_config" in block]
    names = {}
    exec(snippet, names)
    parsed = config.parse(config.Config, names["get_config"]())
    assert parsed.mesh.fsdp == 4
    assert parsed.data.forget == "forget.jsonl"


def test_the_table_of_fields_is_the_schema():
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", README, flags=re.MULTILINE)
    rows = {name.strip("` ") for cell in cells for name in cell.split(",")}
    assert set(Example.__dataclass_fields__) <= rows


def test_the_two_commands_stand_in_the_readme_and_the_gate_runs_the_tests_as_it_says():
    assert (
        "pip install -e .  &&  python -m cipo_jax unlearn --config=configs/quickstart.py "
        "--workdir=runs/quickstart" in README
    )
    assert "pip install -e '.[test]'  &&  python -m pytest" in README
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "-e '.[test]' && python -m pytest" in gate


def test_files_named_in_the_readme_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path
    written = set(re.findall(r"^# (configs/\w+\.py)$", README, flags=re.MULTILINE))
    for path in set(re.findall(r"--config=(configs/\w+\.py)", README)) - written:
        assert (ROOT / path).is_file(), path


def test_no_placeholder_is_left():
    assert "@@" not in README


def test_the_snippet_of_the_sampler_runs(capsys):
    text = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(snippet, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(line.endswith(" tok/s") for line in lines)
    assert any(line.startswith("42 id") for line in lines)
