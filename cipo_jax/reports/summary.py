"""summary.json for programs, and the table before / after / retrained for people."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from cipo_jax import __version__
from cipo_jax.unlearning.run_folder import Row, RunFolder, peak_memory_bytes

_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")
_TABLE = (
    ("forget: leak in CoT", "forget", "cot_leak", "down"),
    ("forget: leak in answer", "forget", "answer_leak", "down"),
    ("forget: think-completion", "forget", "think_completion", "up"),
    ("forget: word validity", "forget", "word_validity", "up"),
    ("retain: accuracy", "retain", "accuracy", "up"),
    ("reasoning: accuracy", "reasoning", "accuracy", "up"),
)


def summarize(folder: RunFolder, result: Row) -> Row:
    """Writes summary.json, once; returns it.

    Args:
      folder: the run's.
      result: what `unlearn` returned.
    """
    path = folder.path / "summary.json"
    if path.exists():
        return folder.read_json("summary.json")
    seconds: dict[str, float] = {}
    for stage, spent in folder.seconds().items():
        # The stages of all iterations are added up: rollouts, pairs, optimize, validate.
        kind = stage.rsplit("/", 1)[-1]
        seconds[kind] = seconds.get(kind, 0.0) + spent
    seconds = {k: round(v, 3) for k, v in seconds.items()}
    total = round(sum(seconds.values()), 3)
    summary = result | {
        "seconds": seconds | {"total": total},
        "seconds_share": {k: round(v / total, 4) for k, v in seconds.items()} if total else {},
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": {"cipo_jax": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in _LIBRARIES},
    }
    folder.write_json("summary.json", summary)
    return summary


def print_scores(title: str, columns: dict[str, Row | None]) -> None:
    """Prints a table of scores, a column a model; None is a model that there is not."""
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


def print_table(summary: Row, path: Path) -> None:
    """Prints the scores of before, after and retrained, the time, and where everything is."""
    name = {"cipo": "CiPO"}.get(summary["method"], summary["method"])
    title = f"{name}: iteration {summary['best']} of {len(summary['iterations'])} kept"
    print_scores(title, {name: summary[name] for name in ("before", "after", "retrained")})
    print(f"n: {_counts(summary['after'])}")
    fluency = summary["fluency"]
    if fluency:
        print(
            "mean log-probability of non-fact tokens under the model before, nats a token: "
            f"{fluency['before']:.3f} before, {fluency['after']:.3f} after"
        )
    seconds = summary["seconds"]
    slowest = sorted((k for k in seconds if k != "total"), key=lambda k: -seconds[k])[:4]
    shares = ", ".join(f"{k} {seconds[k] / seconds['total']:.0%}" for k in slowest)
    print(
        f"{seconds['total']:.0f} s in all ({shares}); "
        f"peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    for file, what in (
        ("summary.json", "these numbers"),
        ("evals", "every question, what was said, what leaked where"),
        ("counterfactuals.jsonl", "the traces that it was taught, and those rejected"),
        ("export", "the unlearned model, a Hugging Face folder"),
    ):
        if (path / file).exists():
            print(f"  {path / file!s:<40} {what}")


def _cell(scores: Row | None, split: str, key: str) -> str:
    if scores is None or not scores[split]["n"]:
        return "n/a"
    return f"{100 * scores[split][key]:.1f} %"


def _counts(scores: dict[str, Any]) -> str:
    return ", ".join(f"{scores[s]['n']} {s}" for s in ("forget", "retain", "reasoning"))
