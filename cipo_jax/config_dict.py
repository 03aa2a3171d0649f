"""Config dataclasses as ConfigDicts, which config files change."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from cipo_jax.settings import (
    Legacy,
    is_dataclass_instance,
    is_optional,
    legacy_of,
    plain_type,
    translated,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def to_config_dict(value: "DataclassInstance") -> ConfigDict:
    """Dataclasses -> a locked ConfigDict that holds every key, typed by the field's type.

    A renamed key may be set by its old name, with a warning that names the new one.
    """
    return _SettingsDict.filled(value, None, "", legacy_of(value)).lock()


class _SettingsDict(ConfigDict):
    """A group of settings that can still be set by their old keys.

    Copies made by `copy.deepcopy` or pickle are plain in that they know the new keys alone.
    """

    _root: "_SettingsDict"
    _prefix: str = ""
    _legacy: Legacy = types.MappingProxyType({})

    @classmethod
    def filled(
        cls,
        value: "DataclassInstance | None",
        root: "_SettingsDict | None",
        prefix: str,
        legacy: Legacy,
    ) -> "_SettingsDict":
        """A dataclass's fields, each typed by its hint; `root` is None for the root itself."""
        self = cls()
        object.__setattr__(self, "_root", self if root is None else root)
        object.__setattr__(self, "_prefix", prefix)
        object.__setattr__(self, "_legacy", legacy)
        hints = typing.get_type_hints(type(value)) if value is not None else {}
        for field in dataclasses.fields(value) if value is not None else ():
            item, hint = getattr(value, field.name), hints[field.name]
            if is_dataclass_instance(item):
                item = cls.filled(item, self._root, f"{prefix}{field.name}.", legacy)
            elif is_optional(hint):
                # A reference keeps the type of what may be set in place of None.
                item = FieldReference(item, field_type=plain_type(hint))
            self[field.name] = item
        return self

    def __getitem__(self, key: str) -> Any:
        gone = f"{self._prefix}{key}."
        if key not in self and any(old.startswith(gone) for old in self._legacy):
            return _SettingsDict.filled(None, self._root, gone, self._legacy).lock()
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: object) -> None:
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

    def update(self, *other: ConfigDict | Mapping[str, object], **kwargs: object) -> None:
        # ConfigDict refuses to set one reference from another, and settings that may be None are
        # references.
        plain = (o.to_dict() if isinstance(o, ConfigDict) else o for o in other)
        super().update(*plain, **kwargs)
