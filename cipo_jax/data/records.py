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
import difflib
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, Union

from cipo_jax.errors import UserError
from cipo_jax.files import atomic_write_text, to_json, write_jsonl

R = TypeVar("R", bound="Record")

_Codec = Callable[[Any], Any]


def field(
    about: str,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
) -> Any:
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

    def to_row(self) -> dict[str, Any]:
        """The JSON object of the record."""
        cls = type(self)
        row = encoder(cls)(self)
        return {"schema": cls.schema_tag(), **row} if cls.schema else row

    @classmethod
    def from_row(cls, row: Any, where: str) -> Self:
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
            return decoder(cls)(row)
        except _Mismatch as error:
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


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None


# ---- types to codecs


class _Mismatch(Exception):
    """A value that does not fit its type.

    Attributes:
      problem: the message.
      path: where in the row: ".pairs[2].ids".
    """

    def __init__(self, problem: str, path: str = ""):
        super().__init__(problem)
        self.problem, self.path = problem, path

    def inside(self, step: str) -> "_Mismatch":
        """The same, seen from the value around."""
        return _Mismatch(self.problem, step + self.path)


def _without_schema(row: Any, tag: str) -> Any:
    if not isinstance(row, dict):
        raise _unexpected("an object", row)
    found = row.get("schema")
    if found != tag:
        name = tag.rpartition("/")[0]
        other = isinstance(found, str) and found.startswith(f"{name}/")
        why = "written by another version of cipo_jax" if other else "another kind of row"
        shown = "is missing" if found is None else f"is {found!r}: {why}"
        raise _Mismatch(f"{shown}; expected {tag!r}", ".schema")
    return {name: value for name, value in row.items() if name != "schema"}


def _unexpected(wanted: str, value: Any) -> _Mismatch:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    return _Mismatch(f"should be {wanted}, not {shown}")


@functools.cache
def fields_of(cls: Any) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    """(field, its resolved type) of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    return tuple((f, hints[f.name]) for f in dataclasses.fields(cls))


def union_members(kind: Any) -> tuple[Any, ...]:
    """The members of a union type; () for other types."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else ()


# Exact types: a boolean is no integer here.
_SCALARS: dict[Any, tuple[str, frozenset[type]]] = {
    str: ("a string", frozenset((str,))),
    int: ("an integer", frozenset((int,))),
    float: ("a number", frozenset((float, int))),
    bool: ("true or false", frozenset((bool,))),
    types.NoneType: ("null", frozenset((types.NoneType,))),
}


@functools.cache
def decoder(kind: Any) -> _Codec:
    """The function from a JSON value to a value of a type; it raises _Mismatch."""
    if kind in _SCALARS:
        return _scalar_decoder(kind)
    if dataclasses.is_dataclass(kind):
        return _object_decoder(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return functools.partial(_decode_literal, args)
    if members := union_members(kind):
        return _union_decoder(members)
    if origin is tuple:
        return _tuple_decoder(args)
    if origin is dict and args[0] is str:
        return functools.partial(_decode_dict, decoder(args[1]))
    raise TypeError(f"records cannot have fields of type {kind}")


def _scalar_decoder(kind: Any) -> _Codec:
    wanted, accepted = _SCALARS[kind]

    def decode(value: Any) -> Any:
        if type(value) not in accepted:
            raise _unexpected(wanted, value)
        return float(value) if kind is float else value

    return decode


def _object_decoder(cls: Any) -> _Codec:
    decoders = {f.name: decoder(kind) for f, kind in fields_of(cls)}
    missing = dataclasses.MISSING
    required = [
        f.name for f, _ in fields_of(cls) if f.default is missing and f.default_factory is missing
    ]

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _unexpected("an object", value)
        for name in required:
            if name not in value:
                raise _Mismatch("is missing", f".{name}")
        values = {}
        for name, item in value.items():
            if name not in decoders:
                near = difflib.get_close_matches(name, decoders, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(decoders)}"
                raise _Mismatch(f"unknown field; {hint}", f".{name}")
            try:
                values[name] = decoders[name](item)
            except _Mismatch as error:
                raise error.inside(f".{name}") from None
        return cls(**values)

    return decode


def _decode_literal(members: tuple[Any, ...], value: Any) -> Any:
    for member in members:
        if type(value) is type(member) and value == member:
            return member
    raise _unexpected(" or ".join(json.dumps(m) for m in members), value)


def _union_decoder(members: tuple[Any, ...]) -> _Codec:
    optional = types.NoneType in members
    decoders = [decoder(member) for member in members if member is not types.NoneType]

    def decode(value: Any) -> Any:
        if value is None and optional:
            return None
        for decode_member in decoders[:-1]:
            try:
                return decode_member(value)
            except _Mismatch:
                continue
        return decoders[-1](value)

    return decode


def _tuple_decoder(args: tuple[Any, ...]) -> _Codec:
    many = len(args) == 2 and args[1] is Ellipsis
    kind = args[0] if many else None
    same, decoders = decoder(args[0]), [] if many else [decoder(arg) for arg in args]
    # Lists of token ids are long: check the set of their types, not each item.
    plain = _SCALARS[kind][1] if many and kind in _SCALARS and kind is not float else None

    def decode(value: Any) -> Any:
        if not isinstance(value, list):
            raise _unexpected("a list", value)
        if plain is not None and plain.issuperset(map(type, value)):
            return tuple(value)
        if not many and len(value) != len(decoders):
            raise _unexpected(f"a list of {len(decoders)}", value)
        each = [same] * len(value) if many else decoders
        return tuple(
            _decode_item(f"[{i}]", decode_one, item)
            for i, (decode_one, item) in enumerate(zip(each, value, strict=True))
        )

    return decode


def _decode_dict(decode_value: _Codec, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _unexpected("an object", value)
    return {name: _decode_item(f".{name}", decode_value, item) for name, item in value.items()}


def _decode_item(step: str, decode: _Codec, item: Any) -> Any:
    try:
        return decode(item)
    except _Mismatch as error:
        raise error.inside(step) from None


@functools.cache
def encoder(kind: Any) -> _Codec:
    """The function from a value of a type to its JSON value."""
    if dataclasses.is_dataclass(kind):
        encoders = [(f.name, encoder(hint)) for f, hint in fields_of(kind)]
        return lambda value: {name: encode(getattr(value, name)) for name, encode in encoders}
    if members := union_members(kind):
        return _union_encoder(members)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            encode = encoder(args[0])
            return list if encode is _unchanged else lambda value: [encode(v) for v in value]
        encoders = [encoder(arg) for arg in args]
        return lambda value: [e(v) for e, v in zip(encoders, value, strict=True)]
    if origin is dict:
        encode = encoder(args[1])
        return lambda value: {name: encode(v) for name, v in value.items()}
    return _unchanged


def _unchanged(value: Any) -> Any:
    return value


def _union_encoder(members: Iterable[Any]) -> _Codec:
    others = [member for member in members if encoder(member) is not _unchanged]
    if not others:
        return _unchanged
    if len(others) > 1:
        raise TypeError("a union may have one member that is not a plain JSON value")
    encode = encoder(others[0])
    outer = typing.get_origin(others[0]) or others[0]
    return lambda value: encode(value) if isinstance(value, outer) else value


def nested_classes(cls: type[Any]) -> Iterator[type[Any]]:
    """The dataclasses that a record's fields contain, at any depth, each once."""
    seen: dict[type[Any], None] = {}

    def visit(kind: Any) -> None:
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if kind not in seen:
                seen[kind] = None
                for _, hint in fields_of(kind):
                    visit(hint)
            return
        for arg in typing.get_args(kind):
            visit(arg)

    for _, hint in fields_of(cls):
        visit(hint)
    yield from seen
