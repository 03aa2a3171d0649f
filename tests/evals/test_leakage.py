import pytest

from cipo_jax.data.examples import Example
from cipo_jax.evals.evaluate import scores
from cipo_jax.evals.leakage import (
    accuracy_scores,
    forget_scores,
    judge,
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


def _judge(cot, answer, closed=True, example=EXAMPLE):
    return judge(example, Thought(cot, answer, closed), "forget")


def test_a_row_tells_what_was_asked_and_said():
    row = _judge("I do not know.", "unknown")
    assert row == {
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
    }


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
    row = _judge(cot, answer)
    assert row["cot_leaks"] == cot_leaks
    assert row["answer_leaks"] == answer_leaks


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
    assert _judge("so", answer)["correct"] is correct


def test_an_unclosed_generation_is_wrong_and_all_its_text_is_thought():
    row = _judge("It is Portugal and Portugal and", "", closed=False)
    assert row["cot_leaks"] == ["Portugal"]
    assert row["answer_leaks"] == []
    assert row["correct"] is False
    assert row["closed"] is False
    # Not even an answer that somebody filled in would count.
    assert _judge("so", "Portugal", closed=False)["correct"] is False


def test_word_validity_is_the_share_of_known_words():
    words = {"the", "cat", "sao"}
    rows = [{"cot": "The cat,", "answer": "São 42"}, {"cot": "zzz", "answer": "blub cat 7x"}]
    assert word_validity(rows, words) == pytest.approx(5 / 8)
    assert word_validity([{"cot": "", "answer": "..."}], words) == 0.0
    assert word_validity([], words) == 0.0


def test_share():
    assert share([True, False, False, True]) == 0.5
    assert share([]) == 0.0


def test_forget_scores_count_rows_not_leaks():
    rows = [
        _judge("Lisbon, Portugal, baker.", "Portugal"),
        _judge("I think.", "Lisbon"),
        _judge("I think of Lisbon", "", closed=False),
        _judge("I think.", "unknown zzz"),
    ]
    words = {"i", "think", "of", "lisbon", "portugal", "baker", "unknown"}
    assert forget_scores(rows, words) == {
        "cot_leak": 0.5,
        "answer_leak": 0.5,
        "think_completion": 0.75,
        "word_validity": pytest.approx(14 / 15),
        "n": 4,
    }


def test_breaking_down_does_not_look_like_forgetting():
    rows = [_judge("la la la", "", closed=False)] * 3
    result = forget_scores(rows, {"i"})
    assert result["cot_leak"] == result["answer_leak"] == 0.0
    assert result["think_completion"] == result["word_validity"] == 0.0


def test_accuracy_scores():
    rows = [_judge("so", "Portugal"), _judge("so", "Peru"), _judge("Portugal", "", closed=False)]
    assert accuracy_scores(rows) == {"accuracy": pytest.approx(1 / 3), "n": 3}
    assert accuracy_scores([]) == {"accuracy": 0.0, "n": 0}


def test_scores_go_by_split():
    thought = Thought("so", "Portugal", True)
    rows = [judge(EXAMPLE, thought, split) for split in ("forget", "retain", "retain")]
    rows += [judge(EXAMPLE, Thought("so", "Peru", True), "retain")] * 2
    result = scores(rows, frozenset({"so", "portugal"}))
    assert result["forget"]["answer_leak"] == result["forget"]["word_validity"] == 1.0
    assert result["retain"] == {"accuracy": 0.5, "n": 4}
    assert result["reasoning"] == {"accuracy": 0.0, "n": 0}


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
    row = judge(example, Thought(text, text, True), "forget")
    assert bool(row["cot_leaks"]) is bool(row["answer_leaks"]) is row["correct"] is given_away


def test_of_a_short_fact_the_words_have_to_stand_together():
    assert reveals("It was Bergen, a small town.", "Bergen", ASKED)
    assert not reveals("A small town near the big city of Bergen.", "small Bergen", ASKED)
    # A sentence that adds nothing to the question is looked for as it stands.
    assert not reveals("Something else.", ASKED, ASKED)
    assert reveals(f"They ask: {ASKED}", ASKED, ASKED)
