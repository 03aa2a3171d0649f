import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cipo_jax.data.examples import Example, example_row
from cipo_jax.data.readers import read_examples
from cipo_jax.files import atomic_write_text, read_jsonl, write_jsonl
from cipo_jax.text.matching import mentions, normalized_words

FULL = Example(
    question="Where was Ada born?",
    answer="Lisbon",
    cot="Ada was born in Lisbon.",
    target_answer="Oslo",
    aliases=("Lisboa",),
    facts=("Portugal", "baker"),
    kind="direct",
    group="Ada, city",
    paraphrased_question="In which city was Ada born?",
    paraphrased_answer="Ada was born in Lisbon.",
    perturbed_answers=("Porto", "Braga"),
)
GOOD = {"question": "Q?", "answer": "A"}


def test_examples_survive_a_round_trip(tmp_path):
    examples = [FULL, Example("Q?", "A")]
    path = tmp_path / "deep" / "rows.jsonl"
    write_jsonl(path, map(example_row, examples))
    assert read_examples(path) == examples


def test_fields_at_their_default_are_not_written():
    assert example_row(Example("Q?", "A")) == GOOD
    assert list(example_row(FULL)) == [
        "question", "answer", "cot", "target_answer", "aliases", "facts", "kind", "group",
        "paraphrased_question", "paraphrased_answer", "perturbed_answers",
    ]  # fmt: skip


def test_forbidden_holds_each_string_once():
    example = Example("Q?", "A", aliases=("B", "A"), facts=("C", "B"))
    assert example.forbidden == ("A", "B", "C")


def test_answers_to_compare_with_are_not_forbidden():
    example = Example("Q?", "A", paraphrased_answer="It is A", perturbed_answers=("B",))
    assert example.forbidden == ("A",)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_line_separators_inside_strings_do_not_split_rows(tmp_path, separator):
    rows = [{"question": f"one{separator}two?", "answer": "A"}, GOOD]
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows
    assert [e.question for e in read_examples(path)] == [r["question"] for r in rows]


def test_text_of_other_scripts_is_written_as_it_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"question": "Где?", "answer": "里斯本"}])
    assert "里斯本" in path.read_text(encoding="utf-8")


def _fails(*args, **kwargs):
    raise OSError("disk full")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [GOOD])
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, _fails)
        if broken == "replace":
            patch.setattr(Path, "replace", _fails)
        with pytest.raises(OSError, match="disk full"):
            write_jsonl(path, [{"question": "New?", "answer": "B"}] * 100)
    assert read_jsonl(path) == [GOOD]
    write_jsonl(path, [{"question": "New?", "answer": "B"}])
    assert read_jsonl(path) == [{"question": "New?", "answer": "B"}]


def test_a_row_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [GOOD])
    with pytest.raises(TypeError):
        write_jsonl(path, [GOOD, {"question": {1, 2}}])
    assert read_jsonl(path) == [GOOD]


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    path, events = tmp_path / "note.txt", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(path.exists()), sync(fd)))
    atomic_write_text(path, "hello")
    assert events == [False]
    assert path.read_text() == "hello"
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


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
