"""Old names of settings, and old ways to write their values; they are read for one version.

LEGACY has an entry for each: a function from the old value (or its text on the command line) to the
new settings and their values.
"""

import json
import re
from collections.abc import Callable, Iterator

from cipo_jax.errors import UserError
from cipo_jax.settings import Legacy, translated

Convert = Callable[[object], dict[str, object]]


def _renamed(*keys: str) -> Convert:
    return lambda value: dict.fromkeys(keys, value)


def _zero_was_default(*keys: str, required: tuple[str, ...] = ()) -> Convert:
    """0 stood for the method's default, which is None now, or the default of `required` keys."""

    def convert(value: object) -> dict[str, object]:
        names, new = (keys, None) if _is_zero(value) else ((*keys, *required), value)
        return dict.fromkeys(names, new)

    return convert


def _is_zero(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return float(value) == 0.0
    except ValueError:
        return False


def _names(key: str, *, empty: object = (), everything: str = "") -> Convert:
    """A comma-separated text became a tuple; the word `everything` is () now."""

    def convert(value: object) -> dict[str, object]:
        if isinstance(value, str):
            value = tuple(_pieces(value, ",")) or empty
        return {key: () if everything and value == (everything,) else value}

    return convert


def _pieces(text: str, separator: str) -> Iterator[str]:
    return (piece.strip() for piece in text.split(separator) if piece.strip())


def _layers(value: object) -> dict[str, object]:
    """Text of layer indices and ranges, "5-7" or "0,3", both ends included."""
    if isinstance(value, str):
        found: set[int] = set()
        for piece in _pieces(value, ","):
            if not re.fullmatch(r"\d+(-\d+)?", piece):
                raise UserError(f"config.baseline.layers = {value!r}: write 5-7, or 0,3")
            first, _, end = piece.partition("-")
            found |= set(range(int(first), int(end or first) + 1))
        value = tuple(sorted(found)) or None
    return {"representation.layers": value}


def _retain(value: object) -> dict[str, object]:
    return {"fixed_target.retain": None if value == "own" else value}


def _variants(value: object) -> dict[str, object]:
    """Lines "name: key=value, key=value" became rows (name, {key: value})."""
    key = "compare.variants"
    if isinstance(value, str):
        value = tuple(_text_row(line, key, "name") for line in _pieces(value, "\n"))
    return {key: _new_changes(value)}


def _overrides(value: object) -> dict[str, object]:
    """Lines "row, row: key=value" became rows ((row, row), {key: value})."""
    if isinstance(value, str):
        rows = (_text_row(line, "compare.own", "row, row") for line in _pieces(value, "\n"))
        value = tuple((tuple(_pieces(names, ",")), changes) for names, changes in rows)
    return {"compare.overrides": _new_changes(value)}


def _text_row(line: str, key: str, form: str) -> tuple[str, dict[str, object]]:
    name, colon, rest = line.partition(":")
    pairs = [pair.split("=", 1) for pair in _pieces(rest, ",")]
    if not colon or any(len(pair) != 2 for pair in pairs):
        raise UserError(f"config.{key}: {line!r} is not of the form '{form}: key=value, key=value'")
    return name.strip(), {key.strip(): _value(text.strip()) for key, text in pairs}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _new_changes(rows: object) -> object:
    """Rows with today's keys in their changes; anything else is returned as it is."""
    if not isinstance(rows, (tuple, list)):
        return rows
    return type(rows)(_new_row(row) for row in rows)


def _new_row(row: object) -> object:
    if not (isinstance(row, (tuple, list)) and len(row) == 2 and isinstance(row[1], dict)):
        return row
    changes = translated(row[1], LEGACY)
    return row if changes == row[1] else (row[0], changes)


def _lrs(value: object) -> dict[str, object]:
    """Text "1e-4, 1e-3; row, row: 1e-2" became a tuple of rates and rows of their own."""
    if not isinstance(value, str):
        return {"compare.lrs": value}
    common, *others = value.split(";")
    rows = []
    for clause in others:
        names, _, lrs = clause.partition(":")
        if not lrs.strip():
            raise UserError(
                f"config.compare.lrs: {clause.strip()!r} is not of the form 'row, row: 1e-3, 1e-2'"
            )
        rows.append((tuple(_pieces(names, ",")), _floats(lrs)))
    return {"compare.lrs": _floats(common), "compare.row_lrs": tuple(rows)}


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(piece) for piece in _pieces(text, ","))
    except ValueError:
        raise UserError(
            f"config.compare.lrs: {text.strip()!r}: must be numbers above 0, comma-separated"
        ) from None


_PHASE = {
    "batch": "batch_size",
    "retain_batch": "retain_batch_size",
    "reasoning_batch": "reasoning_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "decay": "lr_schedule",
    "clip": "max_grad_norm",
}
PHASES: Legacy = {
    f"{phase}.{old}": _renamed(f"{phase}.{new}")
    for phase in ("train", "warmup")
    for old, new in _PHASE.items()
}
PEOPLE: Legacy = {key: _names(key) for key in ("forget.people", "forget.earlier")}
LEGACY: Legacy = {
    **PHASES,
    **PEOPLE,
    "plugins": _names("plugins"),
    "lora.rank_stabilised": _renamed("lora.rank_stabilized"),
    "lora.targets": _names("lora.target_modules"),
    "sampling.rows": _renamed("sampling.max_batch_size"),
    "sampling.chunk": _renamed("sampling.decode_chunk"),
    "eval.rows": _renamed("eval.max_batch_size"),
    "counterfactual.candidates": _renamed("counterfactual.num_candidates"),
    "cipo.samples": _renamed("cipo.num_samples"),
    "cipo.leak_goal": _renamed("selection.leak_goal"),
    "cipo.patience": _renamed("selection.patience"),
    "cipo.beta": _zero_was_default("cipo.beta"),
    "baseline.rounds": _renamed("fixed_target.rounds"),
    "baseline.span": _renamed("fixed_target.span"),
    "baseline.retain": _retain,
    "baseline.forget_weight": _zero_was_default("fixed_target.forget_weight"),
    "baseline.retain_weight": _zero_was_default("fixed_target.retain_weight"),
    "baseline.beta": _zero_was_default(
        "gradient_ascent.beta", "npo.beta", required=("preference.beta", "distillation.beta")
    ),
    "baseline.importance": _renamed("gradient_ascent.importance"),
    "baseline.delta": _renamed("npo.delta"),
    "baseline.alpha": _renamed("refusal.alpha"),
    "baseline.temperature": _renamed("fixed_target.temperature"),
    "baseline.epsilon": _renamed("pdu.epsilon"),
    "baseline.dual_lr": _renamed("pdu.dual_lr"),
    "baseline.layer": _renamed("representation.layer", "fixed_target.layer"),
    "baseline.scale": _renamed("representation.scale"),
    "baseline.layers": _layers,
    "baseline.targets": _names("representation.target_modules"),
    "baseline.trace_weight": _renamed("representation.trace_weight"),
    "baseline.reasoning_weight": _renamed("representation.reasoning_weight"),
    "baseline.trace_tokens": _renamed("representation.trace_tokens"),
    "baseline.alternates": _renamed("preference.num_alternates"),
    "baseline.refusals": _renamed("refusal.path"),
    "compare.methods": _names("compare.methods", everything="all"),
    "compare.variants": _variants,
    "compare.own": _overrides,
    "compare.overrides": _overrides,
    "compare.lrs": _lrs,
}
