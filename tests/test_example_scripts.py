"""The scripts of examples/ and the snippets of the library, each in a process of its own."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from user_runs import environment

from cipo_jax.language_model import LanguageModel

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
DEADLINE = 300  # seconds; each takes less than one minute on two idle cores


def execute(folder, *words):
    """Standard output of `python WORDS`, started in a folder."""
    env = environment() | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(folder, name, *words):
    return execute(folder, ROOT / "examples" / f"{name}.py", *words)


def snippet(page, mark):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if mark in block]
    return block


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_says_how_it_is_run(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"    python examples/{path.name}" in text.split('"""')[1]
    assert f"test_{path.stem}(" in Path(__file__).read_text(encoding="utf-8")


def test_losses_in_your_loop(tmp_path):
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); "
    code += "print(sorted({'cipo_jax.models', 'flax', 'transformers'} & set(sys.modules)))"
    lines = execute(tmp_path, "-c", code, ROOT / "examples" / "losses_in_your_loop.py").splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert len(values) == 10
    assert abs(values[0] - 20 * math.log(2)) < 1e-3
    assert values == sorted(values, reverse=True)
    assert lines[-1] == "[]"


def test_dpo_step(tmp_path):
    printed = script(tmp_path, "dpo_step", "--out=out")
    assert printed.startswith("loss 0.693")
    saved = LanguageModel.from_pretrained(tmp_path / "out")
    assert saved.config == LanguageModel.from_pretrained("asset:tiny_lrm/target").config


def test_rollouts(tmp_path):
    printed = script(tmp_path, "rollouts", "--samples=2")
    assert printed.count("  thought: ") == 4
    assert len(re.findall(r"answer:  42 ", printed)) == 2


@pytest.mark.slow
def test_forget_your_file(tmp_path):
    before, after = script(tmp_path, "forget_your_file").splitlines()
    assert before == "before: leak 100% in CoT, 100% in answers; retained 100%"
    assert re.match(r"after: leak 0% in CoT, 0% in answers; retained \d+%", after)


@pytest.mark.slow
def test_your_method(tmp_path):
    before, after = script(tmp_path, "your_method").splitlines()
    leaks = [float(re.findall(r"answer_leak=([\d.]+)", line)[0]) for line in (before, after)]
    assert leaks[0] > 0.8
    assert leaks[1] < 0.3


def test_the_snippet_of_the_readme(tmp_path):
    block = snippet("README.md", "LanguageModel")
    assert len(block.splitlines()) <= 20
    loss, answer = execute(tmp_path, "-c", block).split()
    assert abs(float(loss) - math.log(2)) < 1e-4
    assert answer == "42"
    assert json.loads((tmp_path / "dpo_model" / "config.json").read_text("utf-8"))


def test_the_snippet_of_the_train_step(tmp_path):
    loss = float(execute(tmp_path, "-c", snippet("docs/training.md", "train_step")))
    assert loss > math.log(2)
    assert (tmp_path / "out" / "model.safetensors").is_file()
