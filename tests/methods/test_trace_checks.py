"""Checks on the text of counterfactual candidates."""

import dataclasses

import pytest

from cipo_jax.data.examples import Example
from cipo_jax.methods.trace_checks import text_faults
from cipo_jax.runs.generation import Generation

EXAMPLE = Example("Where was Ada born?", "Lisbon", aliases=("Lisboa",), facts=("baker",))
GOOD = Generation(
    item=0,
    sample=0,
    cot="I recall Ada. Ada was born in Oslo. So it is Oslo.",
    answer="Oslo",
    closed=True,
    stopped=True,
    ids=(),
)


def _faults(min_distinct=0.3, target="Oslo", **changes):
    return text_faults(dataclasses.replace(GOOD, **changes), EXAMPLE, target, min_distinct)


def test_a_good_candidate_has_no_faults():
    assert _faults() == []
    assert _faults(answer="It is Oslo, I think.") == []


def test_a_think_block_has_to_be_closed():
    assert _faults(closed=False, answer="") == ["does not close its think block"]
    assert _faults(closed=False, stopped=False, answer="") == ["does not close its think block"]


def test_a_generation_has_to_end():
    assert _faults(stopped=False) == ["does not end"]


@pytest.mark.parametrize("answer", ["Bergen", "", "Oslofjord"])
def test_the_target_answer_has_to_be_reached(answer):
    assert _faults(answer=answer) == ["does not reach the target answer 'Oslo'"]


def test_the_target_has_to_be_in_the_answer_and_not_only_in_the_trace():
    assert _faults(answer="unknown") == ["does not reach the target answer 'Oslo'"]
    assert _faults(answer="unknown", target="unknown") == []


@pytest.mark.parametrize("fact", ["Lisbon", "Lisboa", "baker"])
def test_no_forgotten_fact_may_be_mentioned(fact):
    said = f"the forgotten {fact!r}"
    assert _faults(cot=f"{GOOD.cot} Not {fact.upper()}.") == [f"mentions {said}"]
    assert _faults(answer=f"Oslo, not {fact}") == [f"mentions {said}"]
    assert _faults(cot=f"{GOOD.cot} Not {fact}.", answer=f"Oslo, not {fact}") == [
        f"mentions {said}"
    ]
    assert _faults(cot=f"{GOOD.cot} Not {fact}ville.") == []


@pytest.mark.parametrize("cot", ["", "...", "So Oslo."])
def test_a_trace_needs_words(cot):
    assert _faults(cot=cot) == ["degenerate: hardly a word of reasoning"]


def test_three_words_are_enough():
    assert _faults(cot="It is Oslo.") == []


def test_a_trace_of_few_distinct_words_is_degenerate():
    cot = "a b c d e a c e b d"
    assert _faults(cot=cot, min_distinct=0.5) == []
    assert _faults(cot=f"{cot} a", min_distinct=0.5) == ["degenerate: repeats its words"]
    assert _faults(cot="no no no", min_distinct=0.0) == []


def test_a_phrase_may_be_repeated_three_times():
    phrase, others = "it may be so", [f"x{i} y{i} z{i}" for i in range(4)]
    three = " ".join(f"{phrase} {other}" for other in others[:3])
    four = " ".join(f"{phrase} {other}" for other in others)
    assert _faults(cot=three) == []
    assert _faults(cot=four) == ["degenerate: repeats a phrase"]


def test_every_fault_is_told():
    faults = _faults(cot="Lisbon Lisboa", answer="baker", stopped=False)
    assert faults == [
        "does not end",
        "does not reach the target answer 'Oslo'",
        "mentions the forgotten 'Lisbon'",
        "mentions the forgotten 'Lisboa'",
        "mentions the forgotten 'baker'",
        "degenerate: hardly a word of reasoning",
    ]
