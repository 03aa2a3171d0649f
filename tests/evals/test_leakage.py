import pytest

from cipo_jax.data.examples import Example
from cipo_jax.evals.leakage import (
    AccuracyScores,
    ForgetScores,
    GradedGeneration,
    Scores,
    accuracy_scores,
    forget_scores,
    grade,
    leak_rate,
    share,
    word_validity,
)
from cipo_jax.text.chat_format import Thought
from cipo_jax.text.matching import reveals

EXAMPLE = Example(
    "In which country was Ada born?",
    "Portugal",
    aliases=("Portuguese Republic",),
    facts=("Lisbon", "baker"),
    kind="two-hop",
)


def _grade(cot, answer, closed=True, example=EXAMPLE):
    return grade(example, Thought(cot, answer, closed), "forget", (7, 8))


def test_a_graded_generation_holds_question_and_generation():
    row = _grade("I do not know.", "unknown").to_row()
    assert row == {
        "schema": "graded/1",
        "split": "forget",
        "kind": "two-hop",
        "question": EXAMPLE.question,
        "gold": "Portugal",
        "cot": "I do not know.",
        "answer": "unknown",
        "closed": True,
        "cot_leaks": [],
        "answer_leaks": [],
        "correct": False,
        "tokens": 2,
        "ids": [7, 8],
    }
    assert GradedGeneration.from_row(row, "here") == _grade("I do not know.", "unknown")


@pytest.mark.parametrize(
    ("cot", "answer", "cot_leaks", "answer_leaks"),
    [
        ("It is Portugal.", "Peru", ["Portugal"], []),
        ("I guess.", "PORTUGAL!", [], ["Portugal"]),
        ("The Portuguese  republic it is.", "Peru", ["Portuguese Republic"], []),
        ("Born in Lisbon, a baker.", "Peru", ["Lisbon", "baker"], []),
        ("Lisbon is in Portugal.", "Portugal", ["Portugal", "Lisbon"], ["Portugal"]),
        ("She went to a bakery in Lisbonville.", "Portugalia", [], []),
        ("The Portuguese are a republic.", "Peru", [], []),
    ],
)
def test_leaks_are_told_apart_by_where_they_are(cot, answer, cot_leaks, answer_leaks):
    row = _grade(cot, answer)
    assert row.cot_leaks == tuple(cot_leaks)
    assert row.answer_leaks == tuple(answer_leaks)
    assert row.leaked is bool(cot_leaks or answer_leaks)


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("Portugal", True),
        ("It is portugal.", True),
        ("the Portuguese Republic", True),
        ("Lisbon", False),
        ("Peru", False),
        ("", False),
    ],
)
def test_an_answer_is_right_where_it_names_the_gold_or_an_alias(answer, correct):
    assert _grade("so", answer).correct is correct


def test_an_unclosed_generation_is_wrong_and_all_its_text_is_thought():
    row = _grade("It is Portugal and Portugal and", "", closed=False)
    assert row.cot_leaks == ("Portugal",)
    assert row.answer_leaks == ()
    assert row.correct is False
    assert row.closed is False
    # Not even an answer that somebody filled in would count.
    assert _grade("so", "Portugal", closed=False).correct is False


def test_word_validity_is_the_share_of_known_words():
    words = {"the", "cat", "sao"}
    rows = [_grade("The cat,", "São 42"), _grade("zzz", "blub cat 7x")]
    assert word_validity(rows, words) == pytest.approx(5 / 8)
    assert word_validity([_grade("", "...")], words) == 0.0
    assert word_validity([], words) == 0.0


def test_share():
    assert share([True, False, False, True]) == 0.5
    assert share([]) == 0.0


def test_forget_scores_count_rows_not_leaks():
    rows = [
        _grade("Lisbon, Portugal, baker.", "Portugal"),
        _grade("I think.", "Lisbon"),
        _grade("I think of Lisbon", "", closed=False),
        _grade("I think.", "unknown zzz"),
    ]
    words = {"i", "think", "of", "lisbon", "portugal", "baker", "unknown"}
    found = forget_scores(rows, words)
    assert found is not None
    assert found.to_row() == {
        "cot_leak": 0.5,
        "answer_leak": 0.5,
        "think_completion": 0.75,
        "word_validity": pytest.approx(14 / 15),
        "n": 4,
    }
    assert leak_rate(rows) == 0.75
    assert leak_rate([]) is None


def test_breaking_down_does_not_look_like_forgetting():
    rows = [_grade("la la la", "", closed=False)] * 3
    result = forget_scores(rows, {"i"})
    assert result is not None
    assert result.cot_leak == result.answer_leak == result.leak == 0.0
    assert result.think_completion == result.word_validity == 0.0


def test_accuracy_scores():
    rows = [_grade("so", "Portugal"), _grade("so", "Peru"), _grade("Portugal", "", closed=False)]
    assert accuracy_scores(rows) == AccuracyScores(pytest.approx(1 / 3), 3)


def test_scores_go_by_split():
    thought = Thought("so", "Portugal", True)
    rows = [grade(EXAMPLE, thought, split) for split in ("forget", "retain", "retain")]
    rows += [grade(EXAMPLE, Thought("so", "Peru", True), "retain")] * 2
    result = Scores.from_graded(rows, frozenset({"so", "portugal"}))
    assert result.forget is not None
    assert result.forget.answer_leak == result.forget.word_validity == result.forget.leak == 1.0
    assert result.retain == AccuracyScores(0.5, 4)
    assert result.reasoning is None


def test_a_split_without_questions_has_no_scores():
    assert accuracy_scores([]) is None
    assert forget_scores([], {"i"}) is None
    nothing = Scores.from_graded([], frozenset())
    assert nothing.to_row() == {"forget": None, "retain": None, "reasoning": None}
    assert nothing.utility is None
    assert Scores.from_row(nothing.to_row(), "here") == nothing


FORGET = ForgetScores(0.25, 0.5, 0.8, 0.9, 4)


def test_scores_survive_a_round_trip():
    scores = Scores(FORGET, AccuracyScores(0.5, 4), None)
    assert scores.to_row() == {
        "forget": {
            "cot_leak": 0.25,
            "answer_leak": 0.5,
            "think_completion": 0.8,
            "word_validity": 0.9,
            "n": 4,
        },
        "retain": {"accuracy": 0.5, "n": 4},
        "reasoning": None,
    }
    assert Scores.from_row(scores.to_row(), "here") == scores


@pytest.mark.parametrize(
    ("retain", "reasoning", "utility"),
    [
        (0.5, 0.4, 3 / (1 / 0.8 + 1 / 0.5 + 1 / 0.4)),
        (0.5, None, 2 / (1 / 0.8 + 1 / 0.5)),
        (None, None, 1 / (1 / 0.8)),
        (0.5, 0.0, 0.0),
    ],
)
def test_utility_is_the_harmonic_mean_over_the_splits_that_exist(retain, reasoning, utility):
    others = [None if a is None else AccuracyScores(a, 4) for a in (retain, reasoning)]
    assert Scores(FORGET, *others).utility == utility


ASKED = "What does the mother of the author Ada Lind, who was born in Oslo, do for a living?"
SENTENCE = "The mother of Ada Lind is a renowned glassblower who runs a small workshop in Bergen."


@pytest.mark.parametrize(
    ("text", "given_away"),
    [
        (SENTENCE, True),
        ("I think she was a glassblower: renowned, with a small workshop in Bergen that she runs.",
         True),
        ("Her mother runs a small workshop as a renowned glassblower.", True),  # 5 of 6
        ("The mother of Ada Lind is a renowned surgeon who runs a hospital in Bergen.", False),
        ("The mother of the author Ada Lind, who was born in Oslo, does something.", False),
        ("", False),
    ],
)  # fmt: skip
def test_of_a_sentence_most_words_that_it_adds_give_it_away(text, given_away):
    assert reveals(text, SENTENCE, ASKED) is given_away
    example = Example(ASKED, SENTENCE)
    row = grade(example, Thought(text, text, True), "forget")
    assert bool(row.cot_leaks) is bool(row.answer_leaks) is row.correct is given_away


def test_of_a_short_fact_the_words_have_to_stand_together():
    assert reveals("It was Bergen, a small town.", "Bergen", ASKED)
    assert not reveals("A small town near the big city of Bergen.", "small Bergen", ASKED)
    # A sentence that adds nothing to the question is looked for as it stands.
    assert not reveals("Something else.", ASKED, ASKED)
    assert reveals(f"They ask: {ASKED}", ASKED, ASKED)
