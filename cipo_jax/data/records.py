"""Records: frozen dataclasses that read and write themselves as rows of JSON Lines.

A row is the JSON object of a record's fields, in order, after ``"schema": "NAME/VERSION"``. Fields
are strings, numbers, booleans, literals, other dataclasses, and tuples, string-keyed dicts and
unions of these. Reading is strict: the schema, every field and every type must be as declared.

    @dataclasses.dataclass(frozen=True)
    class Rollout(Record):
        schema: ClassVar[str] = "rollout"

        question: str = field("the question that was asked")
        ids: tuple[int, ...] = field("token ids of the completion")
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, overload

from cipo_jax.data.codecs import Mismatch, decoder, encoder, unexpected
from cipo_jax.errors import UserError
from cipo_jax.files import atomic_write_text, to_json, write_jsonl
from cipo_jax.typing import Json

R = TypeVar("R", bound="Record")
T = TypeVar("T")


@overload
def field(about: str) -> Any: ...
@overload
def field(about: str, default: T) -> T: ...
@overload
def field(about: str, *, default_factory: Callable[[], T]) -> T: ...
def field(
    about: str, default: object = dataclasses.MISSING, default_factory: Any = dataclasses.MISSING
) -> object:
    """A dataclass field with its meaning, which docs/formats.md shows.

    Args:
      about: the meaning, with the unit where there is one.
      default: the value where a row lacks the field; without one the field is required.
      default_factory: makes the default.
    """
    metadata = {"about": about}
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Record:
    """Base class of records; subclasses are frozen dataclasses too.

    Attributes:
      schema: the name of the format; "" for a record that only occurs inside of others, whose rows
        carry no "schema".
      version: the version of the format. It grows when a field is renamed, removed, retyped, or
        added without a default.
      stored_in: the files that hold such rows, relative to the run folder, for docs/formats.md.
    """

    schema: ClassVar[str] = ""
    version: ClassVar[int] = 1
    stored_in: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def schema_tag(cls) -> str:
        """The value of "schema" in a row: NAME/VERSION, or "" without a schema."""
        return f"{cls.schema}/{cls.version}" if cls.schema else ""

    def to_row(self) -> dict[str, Json]:
        """The JSON object of the record."""
        cls = type(self)
        row = encoder(cls)(self)
        assert isinstance(row, dict)
        return {"schema": cls.schema_tag(), **row} if cls.schema else row

    @classmethod
    def from_row(cls, row: object, where: str) -> Self:
        """The record of a JSON object.

        Args:
          row: the parsed JSON value.
          where: the place for messages, such as "rollouts.jsonl:7".

        Raises:
          UserError: naming the place and the field, where the row is not such a record.
        """
        try:
            if cls.schema:
                row = _without_schema(row, cls.schema_tag())
            record = decoder(cls)(row)
            assert isinstance(record, cls)
            return record
        except Mismatch as error:
            place = f"{where}:{error.path.lstrip('.')}" if error.path else where
            raise UserError(f"{place}: {error.problem}") from None


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Writes JSON Lines, a record a line, atomically."""
    write_jsonl(path, (record.to_row() for record in records))


def read_records(cls: type[R], path: str | Path) -> tuple[R, ...]:
    """Reads what `write_records` wrote.

    Raises:
      UserError: naming file, line and field, where the file does not hold records of the class.
    """
    # Strings may contain any line separator but "\n", so `splitlines` would be wrong.
    lines = enumerate(_read_text(path).split("\n"), 1)
    return tuple(
        cls.from_row(_parsed(line, f"{path}:{number}"), f"{path}:{number}")
        for number, line in lines
        if line
    )


def write_record(path: str | Path, record: Record) -> None:
    """Writes one record as a JSON file, atomically."""
    atomic_write_text(path, to_json(record.to_row()))


def read_record(cls: type[R], path: str | Path) -> R:
    """Reads what `write_record` wrote.

    Raises:
      UserError: naming file and field, where the file does not hold a record of the class.
    """
    return cls.from_row(_parsed(_read_text(path), str(path)), str(path))


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def _without_schema(row: object, tag: str) -> object:
    if not isinstance(row, dict):
        raise unexpected("an object", row)
    found = row.get("schema")
    if found != tag:
        name = tag.rpartition("/")[0]
        other = isinstance(found, str) and found.startswith(f"{name}/")
        why = "written by another version of cipo_jax" if other else "another kind of row"
        shown = "is missing" if found is None else f"is {found!r}: {why}"
        raise Mismatch(f"{shown}; expected {tag!r}", ".schema")
    return {name: value for name, value in row.items() if name != "schema"}
