"""Words, phrases and how often a phrase is repeated."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cipo_jax.text.matching import max_phrase_count, mentions, normalized_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ada was BORN in Lisbon.", ["ada", "was", "born", "in", "lisbon"]),
        ("São Tomé", ["sao", "tome"]),
        ("Sa\u0303o", ["sao"]),
        ("Ｌｉｓｂｏｎ　４２", ["lisbon", "42"]),
        ("snake_case-and/slash", ["snake", "case", "and", "slash"]),
        ("Straße", ["strasse"]),
        ("47+38=85,", ["47", "38", "85"]),
        ("Москва, ПЕТР", ["москва", "петр"]),
        ("…!? _ ", []),
    ],
)
def test_normalized_words(text, words):
    assert normalized_words(text) == words


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("She was born in lisbon.", "Lisbon"),
        ("She was born in LISBON!", "lisbon"),
        ("**Lisbon**", "Lisbon"),
        ("(Lisbon),", "Lisbon"),
        ("Lisbon", "Lisbon"),
        ("born in Łódź, Poland and São Paulo", "sao paulo"),
        ("born in Sao Paulo", "São Paulo"),
        ("Ｐｏｒｔｏ", "Porto"),
        ("a New\n  York-based firm", "New York"),
        ("new-york", "New York"),
        ("the sum is 85.", "85"),
        ("Она родилась в МОСКВЕ.", "Москве"),
        ("他 出生 在 里斯本 。", "里斯本"),
        ("答案：里斯本。", "里斯本"),
        ("New New York", "New York"),
    ],
)
def test_a_phrase_is_found(text, phrase):
    assert mentions(text, phrase)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("She lives in Portofino.", "Porto"),
        ("Transport", "Porto"),
        ("York is new", "New York"),
        ("New and York", "New York"),
        ("New", "New York"),
        ("the sum is 185.", "85"),
        ("the sum is 850.", "85"),
        ("в подмосковье", "Москве"),
        ("", "Lisbon"),
        ("anything at all", ""),
        ("anything at all", "..."),
    ],
)
def test_a_phrase_is_not_found(text, phrase):
    assert not mentions(text, phrase)


def test_a_phrase_is_found_in_a_script_that_puts_no_spaces_between_words():
    assert mentions("她出生在里斯本。", "里斯本")
    assert not mentions("她出生在里约。", "里斯本")


_words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)


@given(before=_words, phrase=_words.filter(normalized_words), after=_words)
def test_a_phrase_between_other_words_is_always_found(before, phrase, after):
    assert mentions(f"{before} {phrase} {after}", phrase)
    assert mentions(f"{before}, {phrase.upper().lower()}. {after}", phrase.upper().lower())


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_normalizing_twice_changes_nothing(text):
    words = normalized_words(text)
    assert normalized_words(" ".join(words)) == words


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("a b c", 0), ("a b c d", 1), ("a b c d a b c d", 2), ("a a a a a a", 3)],
)
def test_the_most_frequent_phrase_is_counted_with_overlaps(text, count):
    assert max_phrase_count(text.split()) == count


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 5))
def test_the_count_of_phrases_is_that_of_all_pairs(words, length):
    phrases = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    assert max_phrase_count(words, length) == max(map(phrases.count, phrases), default=0)


def test_long_texts_are_counted_fast():
    words, started = [str(i) for i in range(200_000)], time.process_time()
    assert max_phrase_count(words) == 1
    assert time.process_time() - started < 5.0
