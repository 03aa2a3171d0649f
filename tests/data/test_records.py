"""Records: rows out, rows in, and messages that name file, line and field."""

import dataclasses
import json
import math
import time
from typing import ClassVar, Literal

import pytest

from cipo_jax.data.records import (
    Record,
    field,
    read_record,
    read_records,
    write_record,
    write_records,
)
from cipo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Span(Record):
    """A part of a text."""

    start: int = field("index of the first token")
    end: int = field("index after the last token")


@dataclasses.dataclass(frozen=True)
class Rollout(Record):
    """A sampled completion."""

    schema: ClassVar[str] = "rollout"
    version: ClassVar[int] = 2

    question: str = field("the question")
    reason: Literal["eos", "length"] = field("why it ended")
    ids: tuple[int, ...] = field("token ids")
    logps: tuple[float, ...] = field("log-probability of each token, nats")
    closed: bool = field("whether the think block was closed")
    spans: tuple[Span, ...] = field("parts")
    main: Span | None = field("the main part")
    pair: tuple[str, int] = field("a name and a count", ("none", 0))
    seconds: dict[str, float] = field("seconds by stage", default_factory=dict)
    tag: str | int | None = field("anything short", None)


FULL = Rollout(
    question="Wo?\u2028里斯本",
    reason="eos",
    ids=(3, 1, 4),
    logps=(-0.1, -1e-300, -math.pi),
    closed=True,
    spans=(Span(0, 2), Span(2, 3)),
    main=Span(0, 3),
    pair=("a", 1),
    seconds={"sample": 0.25},
    tag=7,
)
PLAIN = Rollout("", "length", (), (), False, (), None)


def test_a_row_starts_with_its_schema_and_keeps_the_order_of_fields():
    row = FULL.to_row()
    assert list(row) == ["schema", *(f.name for f in dataclasses.fields(Rollout))]
    assert row["schema"] == "rollout/2"
    assert row["spans"] == [{"start": 0, "end": 2}, {"start": 2, "end": 3}]
    assert json.loads(json.dumps(row)) == row
    assert Span(1, 2).to_row() == {"start": 1, "end": 2}


def test_records_survive_a_round_trip(tmp_path):
    path = tmp_path / "deep" / "rollouts.jsonl"
    write_records(path, (FULL, PLAIN))
    found = read_records(Rollout, path)
    assert found == (FULL, PLAIN)
    assert path.read_text(encoding="utf-8").count("\n") == 2
    assert "里斯本" in path.read_text(encoding="utf-8")


def test_one_record_is_a_json_file(tmp_path):
    write_record(tmp_path / "one.json", FULL)
    assert read_record(Rollout, tmp_path / "one.json") == FULL
    with pytest.raises(UserError, match=r"one\.json:main\.end: is missing"):
        row = FULL.to_row() | {"main": {"start": 1}}
        (tmp_path / "one.json").write_text(json.dumps(row))
        read_record(Rollout, tmp_path / "one.json")


def test_a_field_at_its_default_may_be_absent():
    row = PLAIN.to_row()
    del row["pair"], row["seconds"], row["tag"]
    assert Rollout.from_row(row, "here") == PLAIN


def test_an_integer_is_a_number_and_becomes_one():
    found = Rollout.from_row(PLAIN.to_row() | {"logps": [-1, -2.5]}, "here")
    assert found.logps == (-1.0, -2.5)
    assert all(type(x) is float for x in found.logps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": 3}, "question: should be a string, not 3"),
        ({"question": None}, "question: should be a string, not null"),
        ({"reason": "eof"}, 'reason: should be "eos" or "length", not "eof"'),
        ({"ids": "abc"}, 'ids: should be a list, not "abc"'),
        ({"ids": [1, 2.5]}, "ids[1]: should be an integer, not 2.5"),
        ({"ids": [1, True]}, "ids[1]: should be an integer, not true"),
        ({"logps": [0.5, "x"]}, 'logps[1]: should be a number, not "x"'),
        ({"logps": [True]}, "logps[0]: should be a number, not true"),
        ({"closed": 1}, "closed: should be true or false, not 1"),
        ({"spans": [{"start": 0, "end": 1}, 5]}, "spans[1]: should be an object, not 5"),
        ({"spans": [{"start": "0", "end": 1}]}, 'spans[0].start: should be an integer, not "0"'),
        ({"spans": [{"start": 0}]}, "spans[0].end: is missing"),
        ({"main": {"start": 0, "end": None}}, "main.end: should be an integer, not null"),
        ({"pair": ["a", 1, 2]}, 'pair: should be a list of 2, not ["a", 1, 2]'),
        ({"pair": ["a", "b"]}, 'pair[1]: should be an integer, not "b"'),
        ({"seconds": {"sample": "1"}}, 'seconds.sample: should be a number, not "1"'),
        ({"seconds": []}, "seconds: should be an object, not []"),
        ({"tag": 0.5}, "tag: should be an integer, not 0.5"),
        ({"closd": True}, "closd: unknown field; did you mean 'closed'?"),
        ({"schema": "rollout/1"}, "schema: is 'rollout/1': written by another version"),
        ({"schema": "graded/2"}, "schema: is 'graded/2': another kind of row"),
        ({"ids": "y" * 90}, 'ids: should be a list, not "' + "y" * 39 + "..."),
    ],
)  # fmt: skip
def test_a_row_that_is_off_is_named_by_file_line_and_field(tmp_path, change, message):
    path = tmp_path / "rows.jsonl"
    rows = [FULL.to_row(), PLAIN.to_row() | change]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_records(Rollout, path)
    assert str(caught.value).startswith(f"{path}:2:{message}")


@pytest.mark.parametrize("name", ["question", "main", "spans"])
def test_a_missing_field_is_named(name):
    row = FULL.to_row()
    del row[name]
    with pytest.raises(UserError, match=rf"^here:3:{name}: is missing$"):
        Rollout.from_row(row, "here:3")


def test_a_row_without_a_schema_is_refused():
    row = FULL.to_row()
    del row["schema"]
    with pytest.raises(UserError, match=r"^here:schema: is missing; expected 'rollout/2'$"):
        Rollout.from_row(row, "here")
    with pytest.raises(UserError, match=r"^here: should be an object, not \[\]$"):
        Rollout.from_row([], "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": ', "rows.jsonl:1: not JSON: "),
        (b"\xff\xfe", "rows.jsonl: not UTF-8 text"),
        (None, "rows.jsonl: cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_records(Rollout, path)
    assert message in str(caught.value)


def test_a_type_that_is_no_json_is_refused_where_the_class_is_used():
    @dataclasses.dataclass(frozen=True)
    class Wrong(Record):
        when: complex = field("no JSON")

    with pytest.raises(TypeError, match="complex"):
        Wrong.from_row({"when": 1}, "here")


def test_many_rows_with_long_id_lists_are_read_and_written_fast(tmp_path):
    record = dataclasses.replace(FULL, ids=tuple(range(500)), logps=())
    path, started = tmp_path / "rows.jsonl", time.process_time()
    write_records(path, [record] * 10_000)
    assert read_records(Rollout, path) == (record,) * 10_000
    assert time.process_time() - started < 10.0
