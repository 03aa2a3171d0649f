import pytest
from cipo_jax.unlearning.counterfactuals import text_faults
from cipo_jax.unlearning.run import best_of, clean_rounds, utility

from cipo_jax.data.examples import Example


def _record(iteration, leak, utility, goal=0.0):
    return {"iteration": iteration, "leak": leak, "clean": leak <= goal, "utility": utility}


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
def test_best_of(records, best):
    rows = [_record(i, leak, merit) for i, (leak, merit) in enumerate(records, 1)]
    assert best_of(rows)["iteration"] == best
    assert best_of(rows[::-1])["iteration"] == best


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
    rows = [_record(i, *record, goal=1.0) for i, record in enumerate(records, 1)]
    assert best_of(rows)["iteration"] == best
    assert best_of(rows[::-1])["iteration"] == best


@pytest.mark.parametrize(
    ("leaks", "count"),
    [([], 0), ([0.1], 0), ([0.0], 1), ([0.0, 0.1], 0), ([0.1, 0.0, 0.0], 2), ([0, 0.1, 0], 1)],
)
def test_clean_rounds_are_those_in_a_row_at_the_end(leaks, count):
    assert clean_rounds([_record(i, leak, 1.0) for i, leak in enumerate(leaks, 1)]) == count


def _scores(completion, retain, reasoning):
    def accuracy(value):
        return {"accuracy": value or 0.0, "n": 0 if value is None else 10}

    return {
        "forget": {"think_completion": completion},
        "retain": accuracy(retain),
        "reasoning": accuracy(reasoning),
    }


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
    ],
)
def test_utility_is_the_harmonic_mean_of_what_there_is(values, expected):
    assert utility(_scores(*values)) == pytest.approx(expected)


EXAMPLE = Example("Where was Ada born?", "Lisbon", aliases=("Lisboa",), facts=("baker",))
GOOD = {
    "cot": "I recall Ada. Ada was born in Oslo. So it is Oslo.",
    "answer": "Oslo",
    "closed": True,
    "stopped": True,
}


def _faults(min_distinct=0.3, target="Oslo", **changes):
    return text_faults(GOOD | changes, EXAMPLE, target, min_distinct)


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
    assert _faults(cot=f"{GOOD['cot']} Not {fact.upper()}.") == [f"mentions {said}"]
    assert _faults(answer=f"Oslo, not {fact}") == [f"mentions {said}"]
    assert _faults(cot=f"{GOOD['cot']} Not {fact}.", answer=f"Oslo, not {fact}") == [
        f"mentions {said}"
    ]
    assert _faults(cot=f"{GOOD['cot']} Not {fact}ville.") == []


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
