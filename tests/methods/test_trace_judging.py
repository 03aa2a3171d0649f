"""Which of several traces is kept, by their text and by the model's log-probabilities."""

import math

import pytest
from fake_run import MODEL, open_fake_run

from cipo_jax.config import Config
from cipo_jax.data.examples import Example
from cipo_jax.methods.trace_checks import Candidate, judge
from cipo_jax.runs.generation import Generation
from cipo_jax.shared_config import CounterfactualConfig

EXAMPLES = [
    Example("Where was Ada born?", "Lisbon", cot="I recall."),
    Example("Where does Bo live?", "Porto", cot="I recall."),
]
SETTINGS = CounterfactualConfig(min_gain=0.5)


@pytest.fixture
def judged(tmp_path, chat):
    """Judges traces of questions: {(question, cot): (gain, style)} says what the model finds."""

    def judge_(*traces, scores, settings=SETTINGS):
        ids = {
            tuple(chat.text_ids(f"{cot}\n</think>\n\nOslo")): scores[cot]
            for drawn in traces
            for cot in drawn
            if cot in scores
        }

        def logp(prompt, completion):
            if tuple(completion) in ids:  # The whole trace.
                gain, style = ids[tuple(completion)]
                start = chat.answer_start(completion)
                answer = (gain - 10.0) / (len(completion) - start)
                return [style] * start + [answer] * (len(completion) - start)
            bare = len(completion) - len(chat.close_ids)  # An empty think block.
            return [-99.0] * len(chat.close_ids) + [-10.0 / bare] * bare

        run = open_fake_run(tmp_path, chat, EXAMPLES, Config(), logp=logp)
        questions = run.workspace.data.forget.questions
        candidates = [
            [Candidate(question, "Oslo", generation(chat, cot)) for cot in drawn]
            for question, drawn in zip(questions, traces, strict=False)
        ]
        return judge(run, MODEL, candidates, settings), run

    return judge_


def generation(chat, cot):
    ids = tuple(chat.text_ids(f"{cot}\n</think>\n\nOslo"))
    return Generation(0, 0, cot, "Oslo", True, True, ids)


ONE, TWO, THREE = "It must be Oslo then", "All points to Oslo here", "Maps name Oslo for this"
LEAKS = "It was Lisbon, no, Oslo"


def test_the_most_likely_trace_of_those_that_raise_the_answer_is_kept(judged):
    scores = {ONE: (2.0, -1.5), TWO: (0.9, -0.5), THREE: (3.0, -1.0)}
    ((accepted, rejected, kept),), _ = judged([ONE, TWO, THREE], scores=scores)
    assert (accepted.trace, accepted.answer) == (TWO, "Oslo")
    assert accepted.gain == pytest.approx(0.9, abs=1e-4)
    assert accepted.style == pytest.approx(-0.5)
    assert accepted.ids == kept.ids and kept.cot == TWO
    assert [(r.trace, r.why) for r in rejected] == [
        (ONE, ("another candidate reads better",)),
        (THREE, ("another candidate reads better",)),
    ]
    assert all(r.target_answer == "Oslo" for r in rejected)


def test_a_trace_has_to_raise_the_answer_by_the_least_gain(judged):
    scores = {ONE: (0.51, -9.0), TWO: (0.49, -0.1)}
    ((accepted, rejected, _),), _ = judged([ONE, TWO], scores=scores)
    assert accepted.trace == ONE
    assert rejected[0].why == ("inconsistent: raises log p(target answer) by 0.49 nats only",)
    ((accepted, rejected, kept),), _ = judged([TWO], scores=scores)
    assert (accepted, kept) == (None, None) and len(rejected) == 1


def test_faults_of_the_text_come_before_the_model_is_asked(judged):
    scores = {ONE: (1.0, -1.0)}
    ((accepted, rejected, _),), run = judged([LEAKS, ONE, ONE], scores=scores)
    assert accepted.trace == ONE
    assert [r.why for r in rejected] == [
        ("mentions the forgotten 'Lisbon'",),
        ("the same text as another candidate",),
    ]
    with_trace, without = run.workspace.scorer.calls
    assert len(with_trace[0]) == len(without[0]) == 1
    assert with_trace[1] == without[1]  # One shape, so one program.


def test_questions_are_judged_apart(judged):
    scores = {ONE: (1.0, -1.0), TWO: (1.0, -2.0)}
    (first, second), _ = judged([LEAKS], [TWO, ONE], scores=scores)
    assert first[0] is None and len(first[1]) == 1
    assert second[0].trace == ONE and [r.trace for r in second[1]] == [TWO]


def test_where_nothing_passes_the_model_is_not_asked(judged):
    ((accepted, rejected, _),), run = judged([LEAKS], scores={})
    assert accepted is None and len(rejected) == 1
    assert run.workspace.scorer.calls == []
    (found,), _ = judged([], scores={})
    assert found == (None, [], None)


def test_settings_set_the_bounds(judged):
    settings = CounterfactualConfig(min_gain=-math.inf, min_distinct=1.0)
    repeats = "Oslo it is, Oslo"
    scores = {repeats: (-3.0, -1.0), ONE: (-3.0, -1.0)}
    ((accepted, rejected, _),), _ = judged([repeats, ONE], scores=scores, settings=settings)
    assert accepted.trace == ONE and accepted.gain == pytest.approx(-3.0, abs=1e-4)
    assert rejected[0].why == ("degenerate: repeats its words",)
