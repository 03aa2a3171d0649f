"""Which iteration is kept, when a run stops early, and scores where a split is missing."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from small_run import open_run

from cipo_jax.config import SelectionConfig
from cipo_jax.data.examples import Example
from cipo_jax.evals.evaluate import Question
from cipo_jax.evals.leakage import AccuracyScores, ForgetScores, Scores, grade
from cipo_jax.reports.summary import Summary, print_scores, print_table
from cipo_jax.runs import evaluation
from cipo_jax.runs.data import QuestionSet
from cipo_jax.runs.evaluation import IterationRecord, converged, select, validated
from cipo_jax.runs.weights import Weights
from cipo_jax.text.chat_format import Thought
from cipo_jax.training.step import PhaseResult


def _record(iteration, leak, utility, goal=0.0):
    weights = Weights(f"iteration-{iteration:02d}", "", 0)
    scores = Scores(None, None, None)
    return IterationRecord(iteration, weights, leak, leak <= goal, utility, scores, None)


@pytest.mark.parametrize(
    ("records", "best"),
    [
        ([(0.0, 0.9), (0.0, 0.8)], 1),
        ([(0.0, 0.8), (0.0, 0.9), (0.0, 0.7)], 2),
        ([(0.3, 0.99), (0.0, 0.1)], 2),
        ([(0.0, 0.1), (0.3, 0.99)], 1),
        ([(0.5, 0.9), (0.2, 0.1), (0.4, 0.95)], 2),
        ([(0.0, 0.9), (0.0, 0.9)], 2),
        ([(0.2, 0.9), (0.2, 0.5)], 2),
        ([(0.0, 0.0)], 1),
    ],
)
def test_select(records, best):
    history = [_record(i, leak, merit) for i, (leak, merit) in enumerate(records, 1)]
    assert select(history).iteration == best
    assert select(history[::-1]).iteration == best


@pytest.mark.parametrize(
    ("records", "best"),
    [
        ([(0.0, 0.9), (0.02, 0.95)], 2),  # 0.947 and 0.965
        ([(0.0, 0.9), (0.05, 0.9)], 1),
        ([(0.01, 0.06), (0.03, 0.88)], 2),  # A ruin is no better for leaking less.
        ([(1.0, 1.0), (0.4, 0.2)], 2),
    ],
)
def test_where_some_leak_is_allowed_it_is_weighed_against_utility(records, best):
    history = [_record(i, *record, goal=1.0) for i, record in enumerate(records, 1)]
    assert select(history).iteration == best
    assert select(history[::-1]).iteration == best


@pytest.mark.parametrize(
    ("leaks", "count"),
    [([], 0), ([0.1], 0), ([0.0], 1), ([0.0, 0.1], 0), ([0.1, 0.0, 0.0], 2), ([0, 0.1, 0], 1)],
)
def test_a_run_ends_with_so_many_clean_iterations_in_a_row(leaks, count):
    history = [_record(i, leak, 1.0) for i, leak in enumerate(leaks, 1)]
    patient = [p for p in range(1, 5) if converged(history, SelectionConfig(patience=p))]
    assert patient == list(range(1, count + 1))


# ---- a split without questions


def _scores(completion, retain, reasoning):
    def accuracy(value):
        return None if value is None else AccuracyScores(value, 10)

    forget = None if completion is None else ForgetScores(0.0, 0.0, completion, 1.0, 10)
    return Scores(forget, accuracy(retain), accuracy(reasoning))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.0, 1.0, 1.0), 1.0),
        ((1.0, 0.5, 0.5), 3 / 5),
        ((0.5, 0.25, 1.0), 3 / 7),
        ((1.0, 0.5, None), 2 / 3),
        ((0.4, None, None), 0.4),
        ((1.0, 0.0, 1.0), 0.0),
        ((0.0, 1.0, 1.0), 0.0),
        ((None, 0.5, None), 0.5),
    ],
)
def test_utility_is_the_harmonic_mean_of_what_there_is(values, expected):
    assert _scores(*values).utility == pytest.approx(expected)


def test_utility_of_nothing_is_none():
    assert _scores(None, None, None).utility is None


QUESTIONS = {
    "forget": Example("Where was Ada born?", "Lisbon"),
    "retain": Example("Where was Bo born?", "Oslo"),
    "reasoning": Example("What is 1 + 1?", "2"),
}


def _question_set(*splits):
    asked = tuple(Question(split, QUESTIONS[split], (1, 2)) for split in splits)
    return QuestionSet(asked, frozenset({"ada", "was", "born", "in", "oslo"}))


def _answers(run, name, title, params, questions, model=None):
    """To each question that it is Oslo, in place of a model's answers."""
    thought = Thought("Ada was born in Oslo", "Oslo", True)
    return tuple(grade(q.example, thought, q.split, (1, 2, 3)) for q in questions.questions)


@pytest.fixture
def validate(tmp_path, monkeypatch):
    """From the splits there are to the record of an iteration, and what was printed of it."""
    monkeypatch.setattr(evaluation, "generate_graded", _answers)

    def call(*splits):
        model = SimpleNamespace(assemble=lambda params: params)
        data = SimpleNamespace(valid=_question_set(*splits))
        run = open_run(
            tmp_path / "-".join(splits), workspace=SimpleNamespace(model=model, data=data)
        )
        printed = []
        run = dataclasses.replace(run, reporter=SimpleNamespace(line=printed.append))
        weights = Weights("iteration-01", "abc", 3)
        run.state.weights.put(weights, PhaseResult({}))
        record = validated(run.at("iterations/01"), weights, 1)
        assert validated(open_again(run), weights, 1) == record
        (line,) = printed
        return record, line, run

    def open_again(run):
        return open_run(run.folder, workspace=run.workspace).at("iterations/01")

    return call


def test_an_iteration_with_all_splits(validate):
    record, line, run = validate("forget", "retain", "reasoning")
    # "oslo" of the answer is valid, as are the words of the thought.
    forget = ForgetScores(0.0, 0.0, 1.0, 1.0, 1)
    assert record.validation == Scores(forget, AccuracyScores(1.0, 1), AccuracyScores(0.0, 1))
    assert (record.leak, record.clean, record.utility) == (0.0, True, 0.0)
    assert line == (
        "iteration 1: validation leak 0.0% in CoT, 0.0% in answers; retain 100.0%, reasoning 0.0%"
    )
    metrics = json.loads(run.path("iterations/01/metrics.json").read_text())
    assert metrics == record.to_row() | {"compilations": metrics["compilations"]}


@pytest.mark.parametrize(
    ("splits", "utility", "kept"),
    [
        (("forget", "retain"), 1.0, "retain 100.0%, reasoning n/a"),
        (("forget", "reasoning"), 0.0, "retain n/a, reasoning 0.0%"),
        (("forget",), 1.0, "retain n/a, reasoning n/a"),
    ],
)
def test_an_iteration_without_a_split_has_no_score_of_it(validate, splits, utility, kept):
    record, line, run = validate(*splits)
    for split in ("forget", "retain", "reasoning"):
        assert (getattr(record.validation, split) is None) == (split not in splits)
    assert record.utility == utility
    assert line.endswith(f"; {kept}")
    saved = evaluation.IterationRecord.load(
        run.path("iterations/01/validate"), run.ledger.result("iterations/01/validate")
    )
    assert saved == record
    row = run.ledger.result("iterations/01/validate")["validation"]
    assert [split for split in row if row[split] is None] == [
        split for split in ("forget", "retain", "reasoning") if split not in splits
    ]


def _summary(before, after, retrained=None):
    return Summary(
        method="cipo",
        before=before,
        after=after,
        retrained=retrained,
        iterations=(_record(1, 0.0, 1.0),),
        best=1,
        fluency=None,
        seconds={"total": 1.0, "train": 1.0},
        seconds_share={"train": 1.0},
        peak_memory_bytes=2**30,
        versions={},
    )


def _cells(printed, row):
    (line,) = [line for line in printed.splitlines() if f" {row} " in line]
    return [cell.strip() for cell in line.split("\u2502")[2:-2]]


def test_a_table_has_no_numbers_of_a_missing_split(capsys, tmp_path):
    before, after = _scores(1.0, 0.5, None), _scores(0.25, 0.75, None)
    print_table(_summary(before, after), tmp_path)
    printed = capsys.readouterr().out
    assert _cells(printed, "reasoning: accuracy") == ["n/a", "n/a", "n/a"]
    assert _cells(printed, "retain: accuracy") == ["50.0 %", "75.0 %", "n/a"]
    assert _cells(printed, "forget: think-completion") == ["100.0 %", "25.0 %", "n/a"]
    assert "n: 10 forget, 10 retain, 0 reasoning" in printed


def test_a_table_of_a_model_that_is_missing_has_no_numbers_of_it(capsys):
    print_scores("Scores", {"one": None, "two": _scores(None, None, 1.0)})
    printed = capsys.readouterr().out
    assert _cells(printed, "reasoning: accuracy") == ["n/a", "100.0 %"]
    assert _cells(printed, "forget: leak in CoT") == ["n/a", "n/a"]
    assert _cells(printed, "retain: accuracy") == ["n/a", "n/a"]
