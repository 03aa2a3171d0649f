"""Settings as frozen dataclasses: declared once, parsed from a ConfigDict, JSON or text, checked.

A setting is a field made by `setting`: its default, its meaning (printed in docs/config.md) and its
range. Its type is one of bool, int, float, str, a Literal of strings, a tuple of one of these, a
tuple of dataclasses ("rows"), or one of them ``| None``, where None means the method's default.
"""

import dataclasses
import difflib
import math
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ml_collections import ConfigDict

from cipo_jax.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from typing_extensions import TypeIs

T = TypeVar("T")
C = TypeVar("C", bound="DataclassInstance")
# {"group.key": value} as pairs, so that it is hashable; written as a dict in config files.
Changes = tuple[tuple[str, object], ...]
# The keyword arguments of `setting`, by name.
Metadata = Mapping[str, Any]
# An old key's value -> the new keys' values. Values may be text, as on the command line.
Legacy = Mapping[str, Callable[[object], dict[str, object]]]


class RenamedSetting(FutureWarning):
    """A setting is given under an old name, or its value in an old form."""


def setting(
    default: T,
    about: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> T:
    """A field that is one setting.

    Args:
      default: its value unless the config says otherwise.
      about: its meaning in one line, for docs/config.md.
      low: least value, included; of each element where the setting is a tuple.
      high: greatest value, included.
      above: greatest value that is too small.
    """
    metadata = {"about": about, "low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata=metadata)


def required_setting(about: str, above: float | None = None) -> Any:
    """A setting without a default, of a row; the arguments are those of `setting`."""
    return setting(dataclasses.MISSING, about, above=above)


def group(cls: type[T]) -> T:
    """A field that is itself a group of settings."""
    return dataclasses.field(default_factory=cls)


def is_dataclass_instance(value: object) -> "TypeIs[DataclassInstance]":
    """Whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


# ---- between dataclasses, ConfigDicts and plain dicts


def flatten(
    config: "DataclassInstance | ConfigDict | Mapping[str, object]", prefix: str = ""
) -> dict[str, object]:
    """Dotted keys -> values, of dataclasses, ConfigDicts or plain dicts."""
    if is_dataclass_instance(config):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, (dict, ConfigDict)) or is_dataclass_instance(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, object]) -> dict[str, object]:
    """Dotted keys -> a nested dict; raises UserError where a key is both a value and a group."""
    nested: dict[str, object] = {}
    for key, value in flat.items():
        *groups, name = key.split(".")
        at = nested
        for depth, part in enumerate(groups, 1):
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                where = ".".join(groups[:depth])
                raise UserError(f"config.{where}: is a group of settings, not a value")
        if isinstance(at.get(name), dict):
            raise UserError(f"config.{key}: is a group of settings, not a value")
        at[name] = value
    return nested


def legacy_of(cls: object) -> Legacy:
    """The renamed keys of a root config, {} where it has none."""
    return getattr(cls, "legacy", {})


def translated(flat: Mapping[str, object], legacy: Legacy) -> dict[str, object]:
    """Flat settings with renamed keys under their new names, each with a warning.

    Warns:
      RenamedSetting: one line, for each old key or old way to write a value.
    """
    changed = {key: legacy[key](value) for key, value in flat.items() if key in legacy}
    for key, values in changed.items():
        if values != {key: flat[key]}:
            warnings.warn(_renamed(key, flat[key], values), RenamedSetting, stacklevel=2)
    replaced = {key for values in changed.values() for key in values}
    new: dict[str, object] = {}
    for key, value in flat.items():
        if key in changed:
            new |= changed[key]
        elif key not in replaced:
            new[key] = value
    return new


def _renamed(key: str, value: object, changed: Mapping[str, object]) -> str:
    others = [f"config.{k}" for k in changed if k != key]
    if key in changed:
        more = f" and {', '.join(others)}" if others else ""
        return f"config.{key} = {value!r} is now written {changed[key]!r}{more}"
    if not others:
        return f"config.{key} = {value!r}: the key is gone; leave it out"
    return f"config.{key} is now {', '.join(others)}; the next version reads the new name only"


def nearest(key: str, known: Iterable[str], count: int = 3) -> str:
    """The known keys that look most like `key`, by whole name or by last part, comma-separated."""
    known = list(known)
    tail = key.rsplit(".", 1)[-1]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, tail, candidate.rsplit(".", 1)[-1]).ratio()
        return whole + last

    return ", ".join(sorted(known, key=likeness, reverse=True)[:count])


# ---- types


def is_optional(hint: object) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def required(hint: object) -> object:
    """The type without ``| None``."""
    if not is_optional(hint):
        return hint
    (kind,) = (a for a in typing.get_args(hint) if a is not type(None))
    return kind


def plain_type(hint: object) -> type:
    """The type that isinstance understands: of a Literal str, of a tuple[...] tuple."""
    kind = required(hint)
    origin = typing.get_origin(kind)
    plain = str if origin is Literal else origin or kind
    assert isinstance(plain, type), f"settings cannot be of type {hint}"
    return plain


def type_name(hint: object) -> str:
    """A setting's type, for messages and docs: "float", "tuple of str", "int or None"."""
    if is_optional(hint):
        return f"{type_name(required(hint))} or None"
    if hint == Changes:
        return "dict of settings"
    if typing.get_origin(hint) is Literal:
        return ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        (element, _) = typing.get_args(hint)
        if dataclasses.is_dataclass(element):
            names = ", ".join(f.name for f in dataclasses.fields(element))
            return f"tuple of ({names})"
        return f"tuple of {type_name(element)}"
    return plain_type(hint).__name__


# ---- parsing


def parse(cls: type[C], config: ConfigDict | Mapping[str, object]) -> C:
    """Makes the dataclass `cls` from a ConfigDict or a nested dict.

    Raises:
      UserError: naming the key, for an unknown key (with the nearest valid ones), a wrong type, or
        a value out of range.

    Warns:
      RenamedSetting: for each old key, or old way to write a value.
    """
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    legacy = legacy_of(cls)
    if any(key in legacy for key in flatten(config)):
        config = unflatten(translated(flatten(config), legacy))
    return _parse(cls, config, "config", set(flatten(cls())))


def _parse(cls: type[C], values: Mapping[str, object], path: str, known: set[str]) -> C:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    parsed = {}
    for key, value in values.items():
        here = f"{path}.{key}"
        if key not in fields:
            full = here.removeprefix("config.")
            raise UserError(f"{here}: no such setting; nearest: {nearest(full, known)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise UserError(f"{here}: is a group of settings, not a value")
            parsed[key] = _parse(hints[key], value, here, known)
        else:
            parsed[key] = _checked(here, value, hints[key], fields[key].metadata)
    return cls(**parsed)


def with_changes(config: C, changes: Iterable[tuple[str, object]]) -> C:
    """The config with some settings changed.

    Args:
      config: a root config.
      changes: pairs of "group.key" (or "key") and value.

    Raises:
      UserError: naming the key, as `parse` does.
    """
    for key, value in changes:
        config = _with(config, key.split("."), checked(type(config), key, value))
    return config


def _with(config: C, path: list[str], value: object) -> C:
    name, *rest = path
    return dataclasses.replace(
        config, **{name: _with(getattr(config, name), rest, value) if rest else value}
    )


def checked(cls: type, key: str, value: object) -> object:
    """The value as setting "group.key" of a root config holds it.

    Raises:
      UserError: naming the key, as `parse` does.
    """
    hint, metadata = find_setting(cls, key)
    return _checked(f"config.{key}", value, hint, metadata)


def find_setting(cls: type, key: str) -> tuple[object, Metadata]:
    """Type and metadata of the setting "group.key".

    Raises:
      UserError: where it is a group, or there is none, with the nearest ones.
    """
    at: object = cls
    for depth, name in enumerate(key.split(".")):
        fields = {f.name: f for f in dataclasses.fields(at)} if dataclasses.is_dataclass(at) else {}
        if name not in fields:
            break
        metadata, at = fields[name].metadata, typing.get_type_hints(at)[name]
        if depth == key.count("."):
            if dataclasses.is_dataclass(at):
                raise UserError(f"config.{key}: is a group of settings, not a value")
            return at, metadata
    raise UserError(f"config.{key}: no such setting; nearest: {nearest(key, flatten(cls()))}")


def _checked(path: str, value: object, hint: object, metadata: Metadata) -> object:
    or_none = ""
    if is_optional(hint):
        if value is None:
            return None
        hint, or_none = required(hint), ", or None"
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"{path} = {value!r}: must be one of {', '.join(choices)}{or_none}")
        return value
    if hint == Changes:
        return _checked_changes(path, value)
    if origin is tuple:
        element = typing.get_args(hint)[0]
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{path} = {value!r}: must be a {type_name(hint)}{or_none}")
        if isinstance(element, type) and dataclasses.is_dataclass(element):
            return tuple(_row(f"{path}[{i}]", v, element) for i, v in enumerate(value))
        return tuple(_checked(f"{path}[{i}]", v, element, metadata) for i, v in enumerate(value))
    kind = plain_type(hint)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{path} = {value!r}: must be of type {kind.__name__}{or_none}")
    if isinstance(value, int | float):
        _check_range(path, value, metadata)
    return value


def _check_range(path: str, value: float, metadata: Metadata) -> None:
    low, high, above = (metadata.get(bound) for bound in ("low", "high", "above"))
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path} = {value!r}: is not a number that can be computed with")
    if low is not None and value < low:
        raise UserError(f"{path} = {value!r}: must be at least {low}")
    if above is not None and value <= above:
        raise UserError(f"{path} = {value!r}: must be above {above}")
    if high is not None and value > high:
        raise UserError(f"{path} = {value!r}: must be at most {high}")


def _row(path: str, value: object, cls: type[C]) -> C:
    """A row as its dataclass, from a tuple in the order of the fields or a dict by their names."""
    names = [f.name for f in dataclasses.fields(cls)]
    if isinstance(value, cls):
        value = {name: getattr(value, name) for name in names}
    elif isinstance(value, (tuple, list)) and len(value) == len(names):
        value = dict(zip(names, value, strict=True))
    if not isinstance(value, dict) or set(value) != set(names):
        raise UserError(f"{path} = {value!r}: must be ({', '.join(names)})")
    hints = typing.get_type_hints(cls)
    metadata = {f.name: f.metadata for f in dataclasses.fields(cls)}
    return cls(**{n: _checked(f"{path}.{n}", value[n], hints[n], metadata[n]) for n in names})


def _checked_changes(path: str, value: object) -> Changes:
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, (tuple, list)) or not all(
        isinstance(p, (tuple, list)) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        raise UserError(f"{path} = {value!r}: must be a dict {{'group.key': value}}")
    return tuple((key, _frozen(item)) for key, item in pairs)


def _frozen(value: object) -> object:
    return tuple(_frozen(v) for v in value) if isinstance(value, (tuple, list)) else value
