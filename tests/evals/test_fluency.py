import numpy as np
import pytest

from cipo_jax.data.tiny_tokenizer import train_tokenizer
from cipo_jax.data.tiny_world import make_world, training_example
from cipo_jax.evals.fluency import fact_tokens, nonfact_logp


@pytest.fixture(scope="session")
def small_tokenizer():
    world = make_world(0, 60, 16)
    examples = [training_example(world, world.people, 0, i) for i in range(300)]
    return train_tokenizer((t for e in examples for t in (e.question, e.cot, e.answer)), 500)


def _marked(tokenizer, text, words):
    """The text of the tokens that are marked, and of those that are not."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    mask = fact_tokens(tokenizer, ids, words)
    assert mask.shape == (len(ids),)
    assert mask.dtype == bool
    split = [tokenizer.decode([i]) for i in ids]
    assert "".join(split) == text
    parts = {True: [], False: []}
    for piece, marked in zip(split, mask, strict=True):
        parts[bool(marked)].append(piece)
    return "".join(parts[True]).split(), "".join(parts[False]).split()


def test_the_tokens_of_fact_words_are_marked(small_tokenizer):
    facts, others = _marked(
        small_tokenizer, "Ada Brandt was born in Lisbon. So it is Lisbon.", {"lisbon"}
    )
    assert facts == ["Lisbon", "Lisbon"]
    assert others == ["Ada", "Brandt", "was", "born", "in.", "So", "it", "is."]


def test_a_word_of_many_tokens_is_marked_whole(small_tokenizer):
    word = "Zyxwvutsr"
    assert len(small_tokenizer.encode(word, add_special_tokens=False)) > 3
    facts, others = _marked(small_tokenizer, f"born in {word}, they say", {"zyxwvutsr"})
    assert facts == [word]
    assert others == ["born", "in,", "they", "say"]


def test_numbers_are_facts(small_tokenizer):
    facts, others = _marked(small_tokenizer, "So 47+38: 85.", set())
    assert facts == ["47", "38", "85"] or "".join(facts) == "473885"
    assert "".join(others) == "So+:."


def test_words_that_only_hold_a_fact_word_are_not_marked(small_tokenizer):
    facts, _ = _marked(small_tokenizer, "Portofino and Transport, PORTO", {"porto"})
    assert facts == ["PORTO"]


def test_without_fact_words_nothing_is_marked(small_tokenizer):
    facts, others = _marked(small_tokenizer, "Ada was born.", {"lisbon"})
    assert facts == []
    assert others == ["Ada", "was", "born."]


def test_special_tokens_and_tags_are_not_marked(small_tokenizer):
    text = "I recall.\n</think>\n\nLisbon"
    ids = small_tokenizer.encode(text, add_special_tokens=False)
    ids.append(small_tokenizer.eos_token_id)
    mask = fact_tokens(small_tokenizer, ids, {"lisbon"})
    assert not mask[-1]
    assert not mask[ids.index(small_tokenizer.convert_tokens_to_ids("</think>"))]
    marked = [i for i, m in zip(ids, mask, strict=True) if m]
    assert small_tokenizer.decode(marked).strip() == "Lisbon"


@pytest.mark.parametrize("word", ["Tromsø", "Łódź", "Москва", "里斯本"])
def test_a_word_whose_letters_are_split_into_bytes_is_marked(small_tokenizer, word):
    from cipo_jax.text.matching import normalized_words

    before = small_tokenizer.encode("born in", add_special_tokens=False)
    inside = small_tokenizer.encode(f" {word}", add_special_tokens=False)
    after = small_tokenizer.encode(". So", add_special_tokens=False)
    mask = fact_tokens(small_tokenizer, [*before, *inside, *after], set(normalized_words(word)))
    assert mask[: len(before)].tolist() == [False] * len(before)
    assert mask[-len(after) :].tolist() == [False] * len(after)
    # A token of nothing but the space in front may go either way.
    assert all(mask[len(before) + 1 : -len(after)])


def test_no_tokens_at_all(small_tokenizer):
    assert fact_tokens(small_tokenizer, [], {"lisbon"}).shape == (0,)


def test_nonfact_logp_is_the_mean_over_all_tokens_that_are_left():
    logps = [np.array([-1.0, -2.0, -9.0]), np.array([-3.0]), np.array([-7.0])]
    facts = [np.array([False, False, True]), np.array([False]), np.array([True])]
    assert nonfact_logp(logps, facts) == pytest.approx(-2.0)


def test_nonfact_logp_of_nothing_but_facts():
    assert nonfact_logp([np.array([-1.0])], [np.array([True])]) == 0.0


def test_logps_and_marks_have_to_be_of_the_same_rows():
    with pytest.raises(ValueError, match="shorter"):
        nonfact_logp([np.zeros(2)] * 2, [np.zeros(2, bool)])
