"""Typed reading of the fields of Hugging Face JSON files (config.json, adapter_config.json)."""

import json
from pathlib import Path
from typing import Any

from cipo_jax.errors import UserError

Fields = dict[str, Any]


def read_fields(folder: str | Path) -> Fields:
    """The fields of a folder's config.json; raises UserError where there is no such file."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; config.model.path must be a Hugging Face folder")
    return read_object(path)


def read_object(path: Path) -> Fields:
    """The JSON object in a file; raises UserError for any other content."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: not a JSON object")
    return fields


def positive_int(fields: Fields, name: str, default: int | None = None) -> int:
    """A field that is an integer above 0; required where `default` is None."""
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if name not in fields:
        raise UserError(f"field {name!r} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"field {name!r} = {value!r}: must be a whole number above 0")
    return value


def positive_number(
    fields: Fields, name: str, where: str = "", default: float | None = None
) -> float:
    """A field that is a number above 0; required where `default` is None.

    Args:
      fields: a JSON object.
      name: of the field.
      where: name of the object in its file, for error messages; "" for the whole file.
      default: value of a missing or null field.
    """
    value = fields.get(name)
    if value is None and default is not None:
        return default
    where = f"field {where!r}: {name!r}" if where else f"field {name!r}"
    if value is None:
        raise UserError(f"{where} is missing")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UserError(f"{where} = {value!r}: must be a number above 0")
    return float(value)


def boolean(fields: Fields, name: str, default: bool = False) -> bool:
    """A field that is true or false; `default` where it is missing or null."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"field {name!r} = {value!r}: must be true or false")
    return default if value is None else value
