import pytest

from cipo_jax.data.examples import Example, example_row
from cipo_jax.data.readers import read_examples
from cipo_jax.files import read_jsonl, write_jsonl

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
