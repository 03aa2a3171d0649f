"""summary.json and the table before / after / retrained."""

import dataclasses
from types import SimpleNamespace

import pytest
from user_runs import read

from cipo_jax.evals.leakage import AccuracyScores, ForgetScores, Scores
from cipo_jax.reports.summary import Summary, print_scores, print_table, summarize
from cipo_jax.runs.evaluation import Fluency, IterationRecord, Result
from cipo_jax.runs.ledger import Ledger, StageIdentity
from cipo_jax.runs.weights import Weights

BEFORE = Scores(
    ForgetScores(1.0, 0.975, 1.0, 0.999, 40), AccuracyScores(0.75, 8), AccuracyScores(0.5, 4)
)
AFTER = Scores(ForgetScores(0.0, 0.025, 0.95, 1.0, 40), AccuracyScores(0.7, 8), None)
ITERATION = IterationRecord(1, Weights("iteration-01", "f", 3), 0.0, True, 0.5, AFTER, None)
RESULT = Result("cipo", BEFORE, AFTER, None, (ITERATION, ITERATION), 1, Fluency(-1.25, -1.5))


@pytest.fixture
def run(tmp_path):
    """As much of a run as a summary needs: two iterations of three and one second."""
    ledger = Ledger(tmp_path)
    seconds = {"before": 4.0, "iterations/01/train": 3.0, "iterations/02/train": 1.0}
    for name in seconds:
        identity = StageIdentity("f@1", {})
        ledger.begin(name, identity)
        ledger.enter(name, identity, {})
    ledger.seconds = lambda: seconds
    return SimpleNamespace(folder=tmp_path, ledger=ledger)


def rows_of(text):
    """The cells of each row of the table, by its name."""
    lines = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


def test_a_summary_adds_the_seconds_of_iterations_up(run):
    summary = summarize(run, RESULT)
    assert summary.seconds == {"before": 4.0, "train": 4.0, "total": 8.0}
    assert summary.seconds_share == {"before": 0.5, "train": 0.5}
    assert summary.peak_memory_bytes > 2**20
    assert {"cipo_jax", "python", "jax"} <= summary.versions.keys()
    there = {f.name: getattr(summary, f.name) for f in dataclasses.fields(Result)}
    assert Result(**there) == RESULT
    assert Summary.from_row(read(run.folder / "summary.json"), "summary.json") == summary
    assert read(run.folder / "summary.json")["after"]["reasoning"] is None


def test_a_summary_is_written_once(run):
    first = summarize(run, RESULT)
    run.ledger.seconds = lambda: {"before": 100.0}
    assert summarize(run, dataclasses.replace(RESULT, best=2)) == first


def test_the_table_has_every_score_and_says_what_is_missing(run, capsys):
    (run.folder / "export").mkdir()
    print_table(summarize(run, RESULT), run.folder)
    said = capsys.readouterr().out
    assert rows_of(said) == {
        "forget: leak in CoT": ["100.0 %", "0.0 %", "n/a", "↓"],
        "forget: leak in answer": ["97.5 %", "2.5 %", "n/a", "↓"],
        "forget: think-completion": ["100.0 %", "95.0 %", "n/a", "↑"],
        "forget: word validity": ["99.9 %", "100.0 %", "n/a", "↑"],
        "retain: accuracy": ["75.0 %", "70.0 %", "n/a", "↑"],
        "reasoning: accuracy": ["50.0 %", "n/a", "n/a", "↑"],
    }
    assert "CiPO: iteration 1 of 2 kept" in said
    assert "n: 40 forget, 8 retain, 0 reasoning" in said
    assert "-1.250 before, -1.500 after" in said
    assert "8 s in all (before 50%, train 50%); peak memory" in said
    # What there is to read, and nothing else.
    assert str(run.folder / "summary.json") in said and str(run.folder / "export") in said
    assert "counterfactuals.jsonl" not in said


def test_without_fluency_and_scores_the_table_has_none(run, capsys):
    bare = Result("ga", None, None, None, (ITERATION,), 1, None)
    print_table(summarize(run, bare), run.folder)
    said = capsys.readouterr().out
    assert set(map(tuple, (cells[:3] for cells in rows_of(said).values()))) == {("n/a",) * 3}
    assert "ga: iteration 1 of 1 kept" in said and "log-probability" not in said
    assert "n: 0 forget, 0 retain, 0 reasoning" in said


def test_scores_of_one_model_are_one_column(capsys):
    print_scores("Scores of x", {"model": BEFORE})
    said = capsys.readouterr().out
    assert "Scores of x" in said
    assert rows_of(said)["reasoning: accuracy"] == ["50.0 %", "↑"]
