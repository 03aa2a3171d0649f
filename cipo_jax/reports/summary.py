"""summary.json for programs, and the table before / after / retrained for people."""

import dataclasses
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from cipo_jax import __version__
from cipo_jax.data.records import field, read_record, write_record
from cipo_jax.evals.leakage import Scores
from cipo_jax.runs.context import Run
from cipo_jax.runs.evaluation import Result
from cipo_jax.runs.memory import peak_memory_bytes

_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")
_TABLE = (
    ("forget: leak in CoT", "forget", "cot_leak", "down"),
    ("forget: leak in answer", "forget", "answer_leak", "down"),
    ("forget: think-completion", "forget", "think_completion", "up"),
    ("forget: word validity", "forget", "word_validity", "up"),
    ("retain: accuracy", "retain", "accuracy", "up"),
    ("reasoning: accuracy", "reasoning", "accuracy", "up"),
)


@dataclasses.dataclass(frozen=True)
class Summary(Result):
    """A finished run: its result, its time and memory."""

    schema: ClassVar[str] = "summary"
    stored_in: ClassVar[tuple[str, ...]] = ("summary.json",)

    seconds: dict[str, float] = field("by stage, those of all iterations added up, and their total")
    seconds_share: dict[str, float] = field("share of the total, by stage")
    peak_memory_bytes: int = field("of the process that finished the run")
    versions: dict[str, str] = field("of this package, Python and libraries")


def summarize(run: Run, result: Result) -> Summary:
    """Writes summary.json, once; returns it."""
    path = run.folder / "summary.json"
    if path.exists():
        return read_record(Summary, path)
    seconds: dict[str, float] = {}
    for stage, spent in run.ledger.seconds().items():
        kind = stage.rsplit("/", 1)[-1]
        seconds[kind] = seconds.get(kind, 0.0) + spent
    seconds = {k: round(v, 3) for k, v in seconds.items()}
    total = round(sum(seconds.values()), 3)
    summary = Summary(
        **{f.name: getattr(result, f.name) for f in dataclasses.fields(Result)},
        seconds=seconds | {"total": total},
        seconds_share={k: round(v / total, 4) for k, v in seconds.items()} if total else {},
        peak_memory_bytes=peak_memory_bytes(),
        versions={"cipo_jax": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in _LIBRARIES},
    )
    write_record(path, summary)
    return summary


def print_scores(title: str, columns: Mapping[str, Scores | None]) -> None:
    """Prints a table of scores, a column a model; None for a model that is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("better", justify="center")
    for row, split, key, better in _TABLE:
        cells = [_cell(scores, split, key) for scores in columns.values()]
        table.add_row(row, *cells, {"down": "↓", "up": "↑"}[better])
    Console().print(table)


def print_table(summary: Summary, path: Path) -> None:
    """Prints the scores of before, after and retrained, the time, and where everything is."""
    result: Result = summary
    name = {"cipo": "CiPO"}.get(result.method, result.method)
    title = f"{name}: iteration {result.best} of {len(result.iterations)} kept"
    columns = {"before": result.before, "after": result.after, "retrained": result.retrained}
    print_scores(title, columns)
    print(f"n: {_counts(result.after)}")
    if result.fluency:
        print(
            "mean log-probability of non-fact tokens under the model before, nats a token: "
            f"{result.fluency.before:.3f} before, {result.fluency.after:.3f} after"
        )
    seconds = summary.seconds
    slowest = sorted((k for k in seconds if k != "total"), key=lambda k: -seconds[k])[:4]
    shares = ", ".join(f"{k} {seconds[k] / seconds['total']:.0%}" for k in slowest)
    print(
        f"{seconds['total']:.0f} s in all ({shares}); "
        f"peak memory {summary.peak_memory_bytes / 2**30:.2f} GiB"
    )
    for file, content in (
        ("summary.json", "these numbers"),
        ("evals", "every question, what was said, what leaked where"),
        ("counterfactuals.jsonl", "the traces that it was taught, and those rejected"),
        ("export", "the unlearned model, a Hugging Face folder"),
    ):
        if (path / file).exists():
            print(f"  {path / file!s:<40} {content}")


def _cell(scores: Scores | None, split: str, key: str) -> str:
    part = getattr(scores, split) if scores is not None else None
    return "n/a" if part is None else f"{100 * getattr(part, key):.1f} %"


def _counts(scores: Scores | None) -> str:
    parts = ((s, getattr(scores, s, None)) for s in ("forget", "retain", "reasoning"))
    return ", ".join(f"{part.n if part else 0} {split}" for split, part in parts)
