"""Data without some split: its scores are n/a everywhere, and never 0."""

import json

import pytest
import user_runs
from user_runs import read

from cipo_jax.__main__ import main
from cipo_jax.data import tiny_world
from cipo_jax.data.examples import example_row
from cipo_jax.hub import resolve

CONFIG = """
from cipo_jax.config import tiny_config


def get_config(arg=None):
    config = tiny_config()
    config.data.world = config.model.retrained = ""
    config.data.forget = "{folder}/forget.jsonl"
    config.data.retain = "{folder}/retain.jsonl"
    config.data.eval_rows = 4
    config.data.valid_rows = 4
    config.eval.max_new_tokens = 48
    config.eval.max_batch_size = config.sampling.max_batch_size = 8
    config.fixed_target.rounds = 1
    config.train.epochs = 0.5
    config.train.batch_size = config.train.retain_batch_size = 8
    config.compare.methods = ("grad_diff",)
    config.compare.seeds = 1
    return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The flag of a config whose data has nothing to reason about."""
    folder = tmp_path_factory.mktemp("data")
    world = tiny_world.World.load(resolve("asset:tiny_lrm/world.json"))
    for name, person in (("forget", world.people[3]), ("retain", world.people[4])):
        rows = map(example_row, tiny_world.questions_about([person], "train"))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "config.py"
    path.write_text(CONFIG.format(folder=folder))
    return f"--config={path}"


def cells(text, row):
    """The cells of a row of a table on the terminal."""
    (line,) = (line for line in text.splitlines() if row in line)
    return [cell.strip() for cell in line.split("│")[2:-2]]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("missing", [("reasoning",), ("retain", "reasoning")])
def test_evaluate_has_no_score_of_a_missing_split(
    config, tmp_path, capsys, monkeypatch, one_device, missing
):
    monkeypatch.setattr("cipo_jax.runs.workspace.make_mesh", lambda **sizes: one_device)
    emptied = ["--config.data.retain="] if "retain" in missing else []
    assert main(["evaluate", config, f"--workdir={tmp_path / 'run'}", *emptied]) == 0
    scores = read(tmp_path / "run" / "scores.json")
    assert [name for name in ("forget", "retain", "reasoning") if scores[name] is None] == list(
        missing
    )
    said = capsys.readouterr().out
    assert cells(said, "forget: leak in CoT") == ["100.0 %"]
    for name in ("retain", "reasoning"):
        found = cells(said, f"{name}: accuracy")
        assert found == ["n/a"] if name in missing else found[0].endswith(" %")


@pytest.mark.slow
def test_unlearn_has_no_score_of_a_missing_split(config, tmp_path):
    workdir = tmp_path / "run"
    done = user_runs.run(
        user_runs.environment(), "-m", "cipo_jax", "unlearn", config, f"--workdir={workdir}",
        "--config.method=grad_diff",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = read(workdir / "summary.json")
    for scores in (summary["before"], summary["after"], summary["iterations"][0]["validation"]):
        assert scores["reasoning"] is None and scores["retain"]["n"] == 4
    # Of retain accuracy and think-completion alone.
    (iteration,) = summary["iterations"]
    parts = [
        iteration["validation"]["retain"]["accuracy"],
        iteration["validation"]["forget"]["think_completion"],
    ]
    expected = 2 / sum(1 / part for part in parts) if all(parts) else 0.0
    assert iteration["utility"] == pytest.approx(expected)
    assert cells(done.stdout, "reasoning: accuracy") == ["n/a", "n/a", "n/a"]
    assert cells(done.stdout, "retain: accuracy")[2] == "n/a"  # No retrained model.
    assert "0 reasoning" in done.stdout
    assert "; retain " in done.stderr and "reasoning n/a" in done.stderr


@pytest.mark.slow
def test_compare_has_no_column_of_a_missing_split(config, tmp_path):
    workdir = tmp_path / "run"
    command = ["-m", "cipo_jax", "compare", config, f"--workdir={workdir}"]
    done = user_runs.run(user_runs.environment(), *command)
    assert done.returncode == 0, done.stderr
    result = read(workdir / "comparison.json")
    assert result["before"]["reasoning"] is None
    (row,) = result["rows"]
    assert "reasoning" not in row["measures"] and "retain" in row["measures"]
    head, _, before, measured = (workdir / "comparison.md").read_text("utf-8").splitlines()[:4]
    assert "reasoning" not in head and "retain" in head
    assert "nan" not in before + measured
    assert (workdir / "comparison.png").stat().st_size > 1000
    assert "retain" in done.stdout and "nan" not in done.stdout
    assert "reasoning n/a" in done.stderr
