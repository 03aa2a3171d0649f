"""Rows of a comparison: methods, or a method with other settings, and their learning rates."""

import dataclasses
from collections.abc import Iterable, Sequence

from cipo_jax.config import Config
from cipo_jax.errors import UserError
from cipo_jax.methods.base import METHODS, Method
from cipo_jax.methods.registry import find, import_plugins
from cipo_jax.settings import Changes, with_changes

# What rows may differ in: model, data, seeds and the retrained model are those of all.
_GROUPS = {
    "cipo", "counterfactual", "distillation", "fixed_target", "gradient_ascent", "lora", "npo",
    "pdu", "preference", "refusal", "representation", "train", "warmup",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CompareRow:
    """A row of the table.

    Attributes:
      name: of the row.
      method: of the registry.
      changes: pairs of "group.key" and value, on the config of the comparison.
    """

    name: str
    method: str
    changes: Changes = ()

    @property
    def folder(self) -> str:
        """The name as one of a folder."""
        return "".join(c if c.isalnum() else "_" for c in self.name)

    @property
    def entry(self) -> Method:
        """The method."""
        return find(self.method)

    def config(self, config: Config) -> Config:
        """The comparison's config with this row's changes."""
        changed = with_changes(dataclasses.replace(config, method=self.method), self.changes)
        return self.entry.configured(changed)


def rows_of(config: Config) -> list[CompareRow]:
    """The rows that a config asks for.

    Raises:
      UserError: for an unknown method or row, two rows of one name, or a setting that rows share.
    """
    import_plugins(config)
    compare = config.compare
    if compare.variants:
        rows = [_variant(variant.name, variant.changes) for variant in compare.variants]
    else:
        rows = [CompareRow(find(name).name, name) for name in compare.methods or METHODS]
    if len({row.folder for row in rows}) < len(rows):
        raise UserError("config.compare: two rows have the same name")
    for override in compare.overrides:
        names = {_row_name(name, rows, "overrides") for name in override.rows}
        rows = [
            # A row's own changes come last: they win.
            dataclasses.replace(row, changes=(*override.changes, *row.changes))
            if row.name in names
            else row
            for row in rows
        ]
    for row in rows:
        _check(row, config)
    return rows


def _variant(name: str, changes: Iterable[tuple[str, object]]) -> CompareRow:
    found = dict(changes)
    return CompareRow(name, str(found.pop("method", "cipo")), tuple(found.items()))


def _check(row: CompareRow, config: Config) -> None:
    row.config(config)
    for key, _ in row.changes:
        if key.partition(".")[0] not in _GROUPS:
            raise UserError(
                f"config.compare: row {row.name!r} cannot change {key!r}: rows share model, "
                f"data and seeds, and differ in {', '.join(sorted(_GROUPS))}"
            )


def learning_rates(config: Config, rows: Sequence[CompareRow]) -> dict[str, tuple[float, ...]]:
    """The learning rates that each row tries, by its name.

    Raises:
      UserError: where config.compare.row_lrs names an unknown row, or a row sets train.lr besides.
    """
    compare = config.compare
    rates = {row.name: compare.lrs or (row.config(config).train.lr,) for row in rows}
    for own in compare.row_lrs:
        for name in own.rows:
            rates[_row_name(name, rows, "row_lrs")] = own.lrs
    for row in rows:
        if "train.lr" in dict(row.changes) and (compare.lrs or compare.row_lrs):
            raise UserError(
                f"config.compare: row {row.name!r} sets train.lr; its rates go into "
                f"config.compare.row_lrs: (({row.name!r},), (...))"
            )
    return {row.name: rates[row.name] for row in rows}


def _row_name(name: str, rows: Sequence[CompareRow], key: str) -> str:
    """The name of a row, or of a method that has no row this time."""
    names = [row.name for row in rows]
    if name not in names and name not in METHODS:
        raise UserError(f"config.compare.{key}: no row {name!r}; rows: {', '.join(names)}")
    return name
