"""docs/formats.md: one section a record class, made from the class itself."""

import dataclasses
from typing import ClassVar, Literal

import pytest

from cipo_jax.data.record_docs import formats_page, json_type, nested_classes
from cipo_jax.data.records import Record, field


@dataclasses.dataclass(frozen=True)
class Step(Record):
    """One update."""

    loss: float | None = field("the loss, nats a token")


@dataclasses.dataclass(frozen=True)
class Log(Record):
    """The updates of a run.

    In their order.

    Attributes:
      schema: not shown.
    """

    schema: ClassVar[str] = "log"
    version: ClassVar[int] = 3
    stored_in: ClassVar[tuple[str, ...]] = ("log.jsonl", "more/*.jsonl")

    kind: Literal["a", "b"] = field("a | b")
    steps: tuple[Step, ...] = field("the updates", ())
    seconds: dict[str, float] = field("by stage", default_factory=dict)
    pair: tuple[str, int] = field("name and count", ("x", 1))


def test_a_page_has_a_section_for_each_class_and_each_nested_one():
    assert (
        formats_page([Log])
        == """## Log

The updates of a run.

In their order.

- Files: `log.jsonl`, `more/*.jsonl`
- Schema: `"schema": "log/3"`

| field | type | meaning |
| --- | --- | --- |
| `kind` | `"a"` or `"b"` | a \\| b |
| `steps` | list of [Step](#step) | the updates; optional |
| `seconds` | object of numbers by name | by stage; optional |
| `pair` | list of string, integer | name and count; default ["x", 1] |

## Step

One update.

| field | type | meaning |
| --- | --- | --- |
| `loss` | number or null | the loss, nats a token |
"""
    )
    assert formats_page([Step, Log, Step]).count("## Step") == 1


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (tuple[tuple[int, ...], ...], "list of lists of integers"),
        (tuple[str | None, ...], "list of strings or nulls"),
        (str | int | None, "string, integer or null"),
        (dict[str, bool], "object of booleans by name"),
        (Literal[1], "`1`"),
    ],
)
def test_json_types_in_words(kind, text):
    assert json_type(kind) == text


def test_a_class_or_field_without_a_meaning_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Bare(Record):
        """No meaning."""

        x: int = 0

    @dataclasses.dataclass(frozen=True)
    class Silent(Record):
        x: int = field("a number")

    with pytest.raises(ValueError, match=r"Bare\.x has no meaning"):
        formats_page([Bare])
    with pytest.raises(ValueError, match="Silent has no docstring"):
        formats_page([Silent])
    with pytest.raises(TypeError, match="complex"):
        json_type(complex)


def test_nested_classes_are_found_at_any_depth():
    @dataclasses.dataclass(frozen=True)
    class Outer(Record):
        logs: dict[str, tuple[Log, ...]] = field("by name")
        step: Step | None = field("one")

    assert list(nested_classes(Outer)) == [Log, Step]
