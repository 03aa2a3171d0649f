"""Stage results: records that keep themselves in the run folder.

The small fields of a result stand in its entry of ``stages.json``; a field made by `rows` stands in
a JSON Lines file named after the stage, where a person can read it.
"""

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from cipo_jax.data.records import Record, read_records, write_records
from cipo_jax.typing import Json

_ROWS = "rows"


def rows(about: str) -> Any:
    """A field `tuple[SomeRecord, ...]` that is kept as a JSON Lines file."""
    return dataclasses.field(metadata={"about": about, _ROWS: True})


@dataclasses.dataclass(frozen=True)
class StageResult(Record):
    """Base class of what stages return."""

    @classmethod
    def _rows_field(cls) -> tuple[str, type[Record]] | None:
        """Name and record class of the field that is kept in a file."""
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.metadata.get(_ROWS):
                return field.name, typing.get_args(hints[field.name])[0]
        return None

    @classmethod
    def files(cls, path: Path) -> tuple[Path, ...]:
        """The files of a result that is kept under a path without suffix."""
        return () if cls._rows_field() is None else (path.with_name(f"{path.name}.jsonl"),)

    def save(self, path: Path) -> dict[str, Json]:
        """Writes the rows; returns the small fields, as JSON, for the stage's entry."""
        found = self._rows_field()
        row = _small(self, found[0] if found else "").to_row()
        if found is not None:
            write_records(self.files(path)[0], getattr(self, found[0]))
            del row[found[0]]
        return row

    @classmethod
    def load(cls, path: Path, entry: dict[str, Json]) -> Self:
        """Reads what `save` kept.

        Raises:
          UserError: where the entry or the file does not hold such a result.
        """
        found = cls._rows_field()
        if found is None:
            return cls.from_row(entry, f"stages.json: stage {path.name}")
        name, kind = found
        small = cls.from_row(entry | {name: []}, f"stages.json: stage {path.name}")
        return dataclasses.replace(small, **{name: read_records(kind, cls.files(path)[0])})


def _small(result: StageResult, rows_field: str) -> StageResult:
    """The result without its rows, so that they are not made into JSON twice."""
    return dataclasses.replace(result, **{rows_field: ()}) if rows_field else result


def result_class(function: Callable[..., object]) -> type[StageResult]:
    """The class that a stage function says it returns."""
    returned = typing.get_type_hints(function).get("return")
    if not (isinstance(returned, type) and issubclass(returned, StageResult)):
        raise TypeError(f"{function.__name__} must be annotated to return a StageResult")
    return returned
