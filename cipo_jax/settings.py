"""Settings as frozen dataclasses: declared once, parsed from a ConfigDict, JSON or text, checked.

A setting is a field made by `setting`: its default, its meaning (printed in docs/config.md) and its
range. Its type is one of bool, int, float, str, a Literal of strings, a tuple of one of these, a
tuple of dataclasses ("rows"), or one of them ``| None``, where None means the method's default.
"""

import ast
import dataclasses
import difflib
import math
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from cipo_jax.errors import UserError

T = TypeVar("T")
# {"group.key": value} as pairs, so that it is hashable; written as a dict in config files.
Changes = tuple[tuple[str, Any], ...]
# An old key's value -> the new keys' values. Values may be text, as on the command line.
Legacy = Mapping[str, Callable[[Any], dict[str, Any]]]


class RenamedSetting(FutureWarning):
    """A setting is given under an old name, or its value in an old form."""


def setting(
    default: Any,
    about: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
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


def group(cls: type[T]) -> T:
    """A field that is itself a group of settings."""
    return dataclasses.field(default_factory=cls)


# ---- between dataclasses, ConfigDicts and plain dicts


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys -> values, of dataclasses, ConfigDicts or plain dicts."""
    if dataclasses.is_dataclass(config):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, (dict, ConfigDict)) or dataclasses.is_dataclass(value)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys -> a nested dict; raises UserError where a key is both a value and a group."""
    nested: dict[str, Any] = {}
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


def legacy_of(cls: Any) -> Legacy:
    """The renamed keys of a root config, {} where it has none."""
    return getattr(cls, "legacy", {})


def to_config_dict(value: Any) -> ConfigDict:
    """Dataclasses -> a locked ConfigDict that holds every key, typed by the field's type.

    A renamed key may be set by its old name, with a warning that names the new one.
    """
    return _SettingsDict.filled(value, None, "", legacy_of(value)).lock()


class _SettingsDict(ConfigDict):
    """A group of settings that can still be set by their old keys.

    Copies made by `copy.deepcopy` or pickle are plain in that they know the new keys alone.
    """

    _root: Any = None
    _prefix: str = ""
    _legacy: Legacy = types.MappingProxyType({})

    @classmethod
    def filled(cls, value: Any, root: Any, prefix: str, legacy: Legacy) -> "_SettingsDict":
        """A dataclass's fields, each typed by its hint; `root` is None for the root itself."""
        self = cls()
        object.__setattr__(self, "_root", self if root is None else root)
        object.__setattr__(self, "_prefix", prefix)
        object.__setattr__(self, "_legacy", legacy)
        hints = typing.get_type_hints(type(value)) if value is not None else {}
        for field in dataclasses.fields(value) if value is not None else ():
            item, hint = getattr(value, field.name), hints[field.name]
            if dataclasses.is_dataclass(item):
                item = cls.filled(item, self._root, f"{prefix}{field.name}.", legacy)
            elif _is_optional(hint):
                # A reference keeps the type of what may be set in place of None.
                item = FieldReference(item, field_type=_plain_type(hint))
            self[field.name] = item
        return self

    def __getitem__(self, key: str) -> Any:
        gone = f"{self._prefix}{key}."
        if key not in self and any(old.startswith(gone) for old in self._legacy):
            return _SettingsDict.filled(None, self._root, gone, self._legacy).lock()
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        old = f"{self._prefix}{key}"
        if self.is_locked and old in self._legacy and not isinstance(value, FieldReference):
            new = translated({old: value}, self._legacy)
            if new != {old: value}:
                for name, item in new.items():
                    *groups, last = name.split(".")
                    at = self._root
                    for part in groups:
                        at = at[part]
                    ConfigDict.__setitem__(at, last, item)
                return
        super().__setitem__(key, value)

    def update(self, *other: Any, **kwargs: Any) -> None:
        # ConfigDict refuses to set one reference from another, and settings that may be None are
        # references.
        plain = (o.to_dict() if isinstance(o, ConfigDict) else o for o in other)
        super().update(*plain, **kwargs)


def translated(flat: Mapping[str, Any], legacy: Legacy) -> dict[str, Any]:
    """Flat settings with renamed keys under their new names, each with a warning.

    Warns:
      RenamedSetting: one line, for each old key or old way to write a value.
    """
    changed = {key: legacy[key](value) for key, value in flat.items() if key in legacy}
    for key, values in changed.items():
        if values != {key: flat[key]}:
            warnings.warn(_renamed(key, flat[key], values), RenamedSetting, stacklevel=2)
    replaced = {key for values in changed.values() for key in values}
    new: dict[str, Any] = {}
    for key, value in flat.items():
        if key in changed:
            new |= changed[key]
        elif key not in replaced:
            new[key] = value
    return new


def _renamed(key: str, value: Any, changed: Mapping[str, Any]) -> str:
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


def _is_optional(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def required(hint: Any) -> Any:
    """The type without ``| None``."""
    if not _is_optional(hint):
        return hint
    (kind,) = (a for a in typing.get_args(hint) if a is not type(None))
    return kind


def _plain_type(hint: Any) -> type:
    """The type that isinstance understands: of a Literal str, of a tuple[...] tuple."""
    kind = required(hint)
    origin = typing.get_origin(kind)
    return str if origin is Literal else origin or kind


def type_name(hint: Any) -> str:
    """A setting's type, for messages and docs: "float", "tuple of str", "int or None"."""
    if _is_optional(hint):
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
    return hint.__name__


# ---- parsing


def parse(cls: type[T], config: Any) -> T:
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


def _parse(cls: type[T], values: dict[str, Any], path: str, known: set[str]) -> T:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
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


def with_changes(config: T, changes: Iterable[tuple[str, Any]]) -> T:
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


def _with(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(
        config, **{name: _with(getattr(config, name), rest, value) if rest else value}
    )


def checked(cls: type, key: str, value: Any) -> Any:
    """The value as setting "group.key" of a root config holds it.

    Raises:
      UserError: naming the key, as `parse` does.
    """
    hint, metadata = find_setting(cls, key)
    return _checked(f"config.{key}", value, hint, metadata)


def find_setting(cls: type, key: str) -> tuple[Any, Mapping[str, Any]]:
    """Type and metadata of the setting "group.key".

    Raises:
      UserError: where it is a group, or there is none, with the nearest ones.
    """
    at: Any = cls
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


def _checked(path: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    or_none = ""
    if _is_optional(hint):
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
        if dataclasses.is_dataclass(element):
            return tuple(_row(f"{path}[{i}]", v, element) for i, v in enumerate(value))
        return tuple(_checked(f"{path}[{i}]", v, element, metadata) for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{path} = {value!r}: must be of type {hint.__name__}{or_none}")
    _check_range(path, value, metadata)
    return value


def _check_range(path: str, value: Any, metadata: Mapping[str, Any]) -> None:
    low, high, above = (metadata.get(bound) for bound in ("low", "high", "above"))
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path} = {value!r}: is not a number that can be computed with")
    if low is not None and value < low:
        raise UserError(f"{path} = {value!r}: must be at least {low}")
    if above is not None and value <= above:
        raise UserError(f"{path} = {value!r}: must be above {above}")
    if high is not None and value > high:
        raise UserError(f"{path} = {value!r}: must be at most {high}")


def _row(path: str, value: Any, cls: Any) -> Any:
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


def _checked_changes(path: str, value: Any) -> Changes:
    pairs = list(value.items()) if isinstance(value, dict) else value
    whole = isinstance(pairs, (tuple, list)) and all(
        isinstance(p, (tuple, list)) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    )
    if not whole:
        raise UserError(f"{path} = {value!r}: must be a dict {{'group.key': value}}")
    return tuple((key, _frozen(item)) for key, item in pairs)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (tuple, list)) else value


# ---- text


def to_literal(value: Any) -> str:
    """A value as a config file writes it: rows as tuples, their settings as dicts."""
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return repr(tuple(_plain_row(row) for row in value))
    return repr(value)


def _plain_row(row: Any) -> tuple[Any, ...]:
    hints = typing.get_type_hints(type(row))
    items = [(hints[f.name], getattr(row, f.name)) for f in dataclasses.fields(row)]
    return tuple(dict(item) if hint == Changes else item for hint, item in items)


def from_text(hint: Any, text: str) -> Any:
    """The value that a command line writes as `text`, still to be checked.

    Tuples are comma-separated or a Python literal; "None" is None where the setting may be None.

    Raises:
      ValueError: where the text is no value of that type; the message says what it must be.
    """
    if _is_optional(hint) and text == "None":
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


def _tuple_from_text(hint: Any, text: str) -> tuple[Any, ...]:
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


def parse_arg(arg: str | None, **defaults: Any) -> Any:
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
    values: Any = ConfigDict(first)
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
        if isinstance(defaults[key], tuple) and value not in defaults[key]:
            choices = ", ".join(map(str, defaults[key]))
            raise UserError(f"config argument {piece!r}: must be one of {choices}")
        values[key] = value
    return values.lock()
