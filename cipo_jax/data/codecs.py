"""Conversion between JSON values and values of declared types, dataclasses among them.

`decoder` checks: each value must have its declared type. `encoder` trusts the types.
"""

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, Union

from cipo_jax.typing import Json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Decoder = Callable[[object], object]  # From an unchecked JSON value.
Encoder = Callable[[Any], Json]  # From a value of the right type.


class Mismatch(Exception):
    """A value that does not fit its type.

    Attributes:
      problem: the message.
      path: where in the row: ".pairs[2].ids".
    """

    def __init__(self, problem: str, path: str = ""):
        super().__init__(problem)
        self.problem, self.path = problem, path

    def inside(self, step: str) -> "Mismatch":
        """The same, seen from the value around."""
        return Mismatch(self.problem, step + self.path)


def unexpected(wanted: str, value: object) -> Mismatch:
    """The error for a value of another type than the wanted one."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    return Mismatch(f"should be {wanted}, not {shown}")


@functools.cache
def fields_of(
    cls: "type[DataclassInstance]",
) -> tuple[tuple[dataclasses.Field[object], object], ...]:
    """(field, its resolved type) of a dataclass, in order."""
    hints = typing.get_type_hints(cls)
    return tuple((f, hints[f.name]) for f in dataclasses.fields(cls))


def union_members(kind: object) -> tuple[object, ...]:
    """The members of a union type; () for other types."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else ()


# Exact types: a boolean is no integer here.
_SCALARS: dict[object, tuple[str, frozenset[type]]] = {
    str: ("a string", frozenset((str,))),
    int: ("an integer", frozenset((int,))),
    float: ("a number", frozenset((float, int))),
    bool: ("true or false", frozenset((bool,))),
    types.NoneType: ("null", frozenset((types.NoneType,))),
}


@functools.cache
def decoder(kind: object) -> Decoder:
    """The function from a JSON value to a value of a type; it raises Mismatch.

    Raises:
      TypeError: where the type has no JSON form.
    """
    if kind in _SCALARS:
        return _scalar_decoder(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
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


def _scalar_decoder(kind: object) -> Decoder:
    wanted, accepted = _SCALARS[kind]

    def decode(value: object) -> object:
        if type(value) not in accepted:
            raise unexpected(wanted, value)
        return float(value) if kind is float and isinstance(value, int) else value

    return decode


def _object_decoder(cls: "type[DataclassInstance]") -> Decoder:
    decoders = {f.name: decoder(kind) for f, kind in fields_of(cls)}
    missing = dataclasses.MISSING
    required = [
        f.name for f, _ in fields_of(cls) if f.default is missing and f.default_factory is missing
    ]

    def decode(value: object) -> object:
        if not isinstance(value, dict):
            raise unexpected("an object", value)
        for name in required:
            if name not in value:
                raise Mismatch("is missing", f".{name}")
        values = {}
        for name, item in value.items():
            if name not in decoders:
                near = difflib.get_close_matches(name, decoders, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(decoders)}"
                raise Mismatch(f"unknown field; {hint}", f".{name}")
            try:
                values[name] = decoders[name](item)
            except Mismatch as error:
                raise error.inside(f".{name}") from None
        return cls(**values)

    return decode


def _decode_literal(members: tuple[object, ...], value: object) -> object:
    for member in members:
        if type(value) is type(member) and value == member:
            return member
    raise unexpected(" or ".join(json.dumps(m) for m in members), value)


def _union_decoder(members: tuple[object, ...]) -> Decoder:
    optional = types.NoneType in members
    decoders = [decoder(member) for member in members if member is not types.NoneType]

    def decode(value: object) -> object:
        if value is None and optional:
            return None
        for decode_member in decoders[:-1]:
            try:
                return decode_member(value)
            except Mismatch:
                continue
        return decoders[-1](value)

    return decode


def _tuple_decoder(args: tuple[object, ...]) -> Decoder:
    many = len(args) == 2 and args[1] is Ellipsis
    kind = args[0] if many else None
    same, decoders = decoder(args[0]), [] if many else [decoder(arg) for arg in args]
    # Lists of token ids are long: check the set of their types, not each item.
    plain = _SCALARS[kind][1] if many and kind in _SCALARS and kind is not float else None

    def decode(value: object) -> object:
        if not isinstance(value, list):
            raise unexpected("a list", value)
        if plain is not None and plain.issuperset(map(type, value)):
            return tuple(value)
        if not many and len(value) != len(decoders):
            raise unexpected(f"a list of {len(decoders)}", value)
        each = [same] * len(value) if many else decoders
        return tuple(
            _decode_item(f"[{i}]", decode_one, item)
            for i, (decode_one, item) in enumerate(zip(each, value, strict=True))
        )

    return decode


def _decode_dict(decode_value: Decoder, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise unexpected("an object", value)
    return {name: _decode_item(f".{name}", decode_value, item) for name, item in value.items()}


def _decode_item(step: str, decode: Decoder, item: object) -> object:
    try:
        return decode(item)
    except Mismatch as error:
        raise error.inside(step) from None


@functools.cache
def encoder(kind: object) -> Encoder:
    """The function from a value of a type to its JSON value."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
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


def _unchanged(value: Any) -> Json:
    return value


def _union_encoder(members: Iterable[object]) -> Encoder:
    others = [member for member in members if encoder(member) is not _unchanged]
    if not others:
        return _unchanged
    if len(others) > 1:
        raise TypeError("a union may have one member that is not a plain JSON value")
    encode = encoder(others[0])
    outer = typing.get_origin(others[0]) or others[0]
    assert isinstance(outer, type)
    return lambda value: encode(value) if isinstance(value, outer) else value
