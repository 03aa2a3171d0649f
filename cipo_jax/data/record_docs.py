"""The text of docs/formats.md, generated from record classes."""

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from cipo_jax.data.codecs import fields_of, union_members
from cipo_jax.data.records import Record

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_SCALARS = {
    str: ("string", "strings"),
    int: ("integer", "integers"),
    float: ("number", "numbers"),
    bool: ("boolean", "booleans"),
    types.NoneType: ("null", "nulls"),
}
_SINGULAR, _PLURAL = 0, 1


def formats_page(record_classes: "Sequence[type[DataclassInstance]]") -> str:
    """A Markdown section for each record class, and for each dataclass nested in one.

    A section holds the class's docstring, the files that hold its rows, its schema and version, and
    a table of its fields: name, JSON type, meaning.

    Args:
      record_classes: in the order of their sections; nested classes follow them.

    Raises:
      ValueError: naming a class without a docstring or a field without a meaning.
    """
    nested = (inner for cls in record_classes for inner in nested_classes(cls))
    classes = dict.fromkeys((*record_classes, *nested))
    return "\n".join(_section(cls) for cls in classes)


def _section(cls: "type[DataclassInstance]") -> str:
    lines = [f"## {cls.__name__}", "", _about(cls), ""]
    if stored_in := getattr(cls, "stored_in", ()):
        lines.append(f"- Files: {', '.join(f'`{file}`' for file in stored_in)}")
    tag = cls.schema_tag() if issubclass(cls, Record) else ""
    if tag:
        lines.append(f'- Schema: `"schema": "{tag}"`')
    if stored_in or tag:
        lines.append("")
    lines += ["| field | type | meaning |", "| --- | --- | --- |"]
    lines += [
        f"| `{field.name}` | {_escaped(json_type(kind))} | {_escaped(_meaning(cls, field))} |"
        for field, kind in fields_of(cls)
    ]
    return "\n".join(lines) + "\n"


def _about(cls: "type[DataclassInstance]") -> str:
    """The paragraphs of the docstring up to a section such as "Attributes:"."""
    text = cls.__doc__ or ""
    if not text or text.startswith(f"{cls.__name__}("):  # What dataclasses put in place of none.
        raise ValueError(f"{cls.__name__} has no docstring")
    return inspect.cleandoc(text).partition("\n\nAttributes:")[0]


def _meaning(cls: "type[DataclassInstance]", field: dataclasses.Field[object]) -> str:
    about = field.metadata.get("about")
    if not about:
        raise ValueError(f"{cls.__name__}.{field.name} has no meaning: declare it with `field`")
    missing = dataclasses.MISSING
    if field.default is missing and field.default_factory is missing:
        return about
    default = field.default_factory() if callable(field.default_factory) else field.default
    if default is None or default in ("", (), {}):
        return f"{about}; optional"
    return f"{about}; default {json.dumps(default, ensure_ascii=False)}"


def json_type(kind: object, number: int = _SINGULAR) -> str:
    """The JSON type of a field in words: "list of integers", "[Scores](#scores) or null".

    Args:
      kind: the field's type.
      number: 0 for the singular, 1 for the plural.
    """
    if kind in _SCALARS:
        return _SCALARS[kind][number]
    if dataclasses.is_dataclass(kind):
        name = getattr(kind, "__name__", "")
        return f"[{name}](#{name.lower()})"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return _either(f"`{json.dumps(arg)}`" for arg in args)
    if members := union_members(kind):
        return _either(json_type(member, number) for member in members)
    if origin is tuple:
        name = ("list", "lists")[number]
        if len(args) == 2 and args[1] is Ellipsis:
            return f"{name} of {json_type(args[0], _PLURAL)}"
        return f"{name} of {', '.join(json_type(arg) for arg in args)}"
    if origin is dict:
        return f"{('object', 'objects')[number]} of {json_type(args[1], _PLURAL)} by name"
    raise TypeError(f"records cannot have fields of type {kind}")


def _either(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def nested_classes(cls: "type[DataclassInstance]") -> "Iterator[type[DataclassInstance]]":
    """The dataclasses that a record's fields contain, at any depth, each once."""
    seen: dict[type, None] = {}

    def visit(kind: object) -> None:
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
