"""Values of settings as text: of the command line, and of config files."""

import ast
import dataclasses
import typing
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from cipo_jax.errors import UserError
from cipo_jax.settings import Changes, is_optional, nearest, required, type_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def to_literal(value: object) -> str:
    """A value as a config file writes it: rows as tuples, their settings as dicts."""
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return repr(tuple(_plain_row(row) for row in value))
    return repr(value)


def _plain_row(row: "DataclassInstance") -> tuple[object, ...]:
    hints = typing.get_type_hints(type(row))
    items = [(hints[f.name], getattr(row, f.name)) for f in dataclasses.fields(row)]
    return tuple(dict(item) if hint == Changes else item for hint, item in items)


def from_text(hint: object, text: str) -> object:
    """The value that a command line writes as `text`, still to be checked.

    Tuples are comma-separated or a Python literal; "None" is None where the setting may be None.

    Raises:
      ValueError: where the text is no value of that type; the message says what it must be.
    """
    if is_optional(hint) and text == "None":
        return None
    kind = required(hint)
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError("must be true or false")
        return text.lower() in ("true", "1")
    if typing.get_origin(kind) is tuple:
        return _tuple_from_text(kind, text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"must be of type {type_name(hint)}") from None
    return text


def _tuple_from_text(hint: object, text: str) -> tuple[object, ...]:
    element = typing.get_args(hint)[0]
    if dataclasses.is_dataclass(element) or text.lstrip()[:1] in ("(", "["):
        try:
            value = ast.literal_eval(text) if text.strip() else ()
        except (SyntaxError, ValueError):
            value = None
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"must be a {type_name(hint)}, as Python writes it")
        return tuple(value)
    try:
        return tuple(from_text(element, p.strip()) for p in text.split(",") if p.strip())
    except ValueError:
        raise ValueError(f"must be a {type_name(hint)}, comma-separated") from None


def parse_arg(arg: str | None, **defaults: object) -> ConfigDict:
    """The argument of a config file, ``--config=FILE.py:key=value,key=value``.

    Args:
      arg: what stands after the colon; None or "" for nothing.
      **defaults: the keys and their defaults, whose types they have; a tuple lists the choices, of
        which the first is the default. A bool key may stand alone, for true.

    Returns:
      A ConfigDict of the keys.

    Raises:
      UserError: naming the nearest key, or what a value must be.
    """
    first = {k: d[0] if isinstance(d, tuple) else d for k, d in defaults.items()}
    values = ConfigDict(first)
    for piece in (p.strip() for p in (arg or "").split(",") if p.strip()):
        key, equals, text = (part.strip() for part in piece.partition("="))
        if not defaults:
            raise UserError(f"config argument {arg!r}: this config file takes none")
        if key not in defaults:
            near = nearest(key, defaults)
            raise UserError(f"config argument {piece!r}: no such key; nearest: {near}")
        kind = type(first[key])
        if not equals and kind is not bool:
            raise UserError(f"config argument {piece!r}: write {key}=VALUE")
        try:
            value = from_text(kind, text) if equals else True
        except ValueError as error:
            raise UserError(f"config argument {piece!r}: {error}") from None
        choices = defaults[key]
        if isinstance(choices, tuple) and value not in choices:
            choices = ", ".join(map(str, choices))
            raise UserError(f"config argument {piece!r}: must be one of {choices}")
        values[key] = value
    return values.lock()
