"""What the README says is run, so that it stays true."""

import re
import subprocess
import sys
from pathlib import Path

from cipo_jax import config
from cipo_jax.data.examples import Example

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_losses_snippet_runs_and_prints_what_it_says():
    (snippet,) = [block for block in python_blocks() if "from cipo_jax import losses" in block]
    printed = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, check=True
    ).stdout
    loss, margin = map(float, printed.split())
    assert abs(loss - 0.6931472) < 1e-6
    assert margin == 0.0


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
