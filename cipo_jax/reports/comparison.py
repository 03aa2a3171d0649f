"""A comparison as a Markdown table, a plot and a table on the terminal."""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path

from cipo_jax.config import Config
from cipo_jax.evals.leakage import AccuracyScores, ForgetScores, Scores
from cipo_jax.experiments.compare import ComparisonResult, Measured, TableRow
from cipo_jax.experiments.comparison_measures import MEASURES, Measures
from cipo_jax.experiments.sequential import SequenceResult
from cipo_jax.files import atomic_write_text

_PERCENT = {
    "cot_leak", "answer_leak", "zero_leak", "less_leak", "think_completion", "retain", "reasoning",
}  # fmt: skip
_DIGITS = {"ks": 3, "kl": 3, "steps": 0, "seconds": 0, "peak_gib": 2}
_ARROWS = {True: " ↑", False: " ↓", None: ""}


def budget_line(config: Config, result: ComparisonResult) -> str:
    """How every row was tuned, in a sentence."""
    seeds, tried = result.seeds, collections.defaultdict(list)
    for name, lrs in result.lrs.items():
        tried[lrs].append(name)
    # Most rows first, by no name; those with rates of their own after them.
    (common, _), *others = sorted(tried.items(), key=lambda item: -len(item[1]))
    tuned = f"learning rate {common[0]:g}"
    if len(common) > 1:
        tuned = f"learning rate chosen by validation with seed 0 among {_listed(common)}"
    own = [f"{', '.join(names)}: {_listed(lrs)}" for lrs, names in others]
    tuned += f" ({'; '.join(own)})" if own else ""
    epochs, rounds = f"{config.train.epochs:g}", config.fixed_target.rounds
    return (
        f"Every row: {tuned}; at most {rounds} rounds of {epochs} epochs (CiPO: "
        f"{config.cipo.iterations} iterations of as many after a warm-up of "
        f"{config.warmup.epochs:g}), of which validation keeps one; mean ± standard deviation over "
        f"{seeds} seeds."
    )


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{x:g}" for x in numbers)


def _cell(key: str, measure: Measured | None, spread: bool = True) -> str:
    if measure is None:
        return "–"
    scale, digits = (100, 1) if key in _PERCENT else (1, _DIGITS[key])
    text = f"{scale * measure.mean:.{digits}f}"
    if spread and len(measure.values) > 1 and key not in ("seconds", "peak_gib"):
        text += f" ± {scale * measure.std:.{digits}f}"
    return text


def _single(measures: Measures) -> dict[str, Measured]:
    return {key: Measured(value, 0.0, (value,)) for key, value in measures.present().items()}


def _rows(
    result: ComparisonResult,
) -> list[tuple[str, Mapping[str, Measured], float | None]]:
    """Name, measures and learning rate of each row of the table."""
    rows: list[tuple[str, Mapping[str, Measured], float | None]] = [
        ("before", _single(result.before), None)
    ]
    for row in result.rows:
        rows.append((row.name + _divergence_note(row, result.seeds), row.measures, row.lr))
    return rows


def _divergence_note(row: TableRow, seeds: int) -> str:
    """How many seeds diverged, and how many the row's means are over, where that is fewer."""
    if not row.diverged:
        return ""
    measured = max((len(measure.values) for measure in row.measures.values()), default=0)
    fewer = f"; {measured} measured" if measured < seeds else ""
    return f" (diverged: {row.diverged} of {seeds} seeds{fewer})"


def _shown(result: ComparisonResult) -> list[tuple[str, str]]:
    """Key and heading of the measures that any row has."""
    rows = [measures for _, measures, _ in _rows(result)]
    return [
        (key, heading + _ARROWS[better])
        for key, heading, better in MEASURES
        if any(key in measures for measures in rows)
    ]


def markdown(result: ComparisonResult, config: Config) -> str:
    """The table, the budget and what n is."""
    shown = _shown(result)
    lines = [
        f"| method | {' | '.join(heading for _, heading in shown)} | lr |",
        "|---|" + "--:|" * (len(shown) + 1),
    ]
    for name, measures, lr in _rows(result):
        cells = [_cell(key, measures.get(key)) for key, _ in shown]
        cell = name.replace("|", "\\|")
        lines.append(f"| {cell} | {' | '.join(cells)} | {'–' if lr is None else f'{lr:g}'} |")
    own = [
        f"{', '.join(o.rows)}: {', '.join(f'{key}={value}' for key, value in o.changes)}"
        for o in config.compare.overrides
    ]
    if own:
        own = [f"Settings of single rows: {'; '.join(own)}."]
    n = ", ".join(f"{count} {split}" for split, count in result.n.items())
    return "\n".join([*lines, "", budget_line(config, result), *own, f"n: {n} questions."]) + "\n"


def write_comparison(result: ComparisonResult, config: Config, folder: Path) -> list[Path]:
    """Writes comparison.md and, with matplotlib, comparison.png; returns what there is to read."""
    atomic_write_text(folder / "comparison.md", markdown(result, config))
    written = [folder / "comparison.json", folder / "comparison.md"]
    try:
        draw(result, folder / "comparison.png")
        written.append(folder / "comparison.png")
    except ImportError:
        print("no comparison.png: pip install matplotlib (or this package's extra: plots)")
    return written


def merit(measures: Mapping[str, Measured]) -> tuple[float, float, float, float]:
    """(leak, its deviation, utility, its deviation) in percent.

    Leak is the greatest of CoT, answer and both attacks, utility the harmonic mean of retain and
    reasoning accuracy, or the one that there is; of each seed, then averaged.
    """
    import numpy as np

    leaks = [measures[k].values for k in ("cot_leak", "answer_leak", "zero_leak", "less_leak")]
    leak = 100 * np.max(np.array(leaks), axis=0)
    kept = [100 * np.array(measures[k].values) for k in ("retain", "reasoning") if k in measures]
    utility = kept[0] if kept else np.full(len(leak), np.nan)
    if len(kept) == 2:
        utility = 2 * kept[0] * kept[1] / np.maximum(kept[0] + kept[1], 1e-9)
    freedom = 1 if len(leak) > 1 else 0  # As in the table: of a sample.
    return (
        float(leak.mean()),
        float(leak.std(ddof=freedom)),
        float(utility.mean()),
        float(utility.std(ddof=freedom)),
    )


def draw(result: ComparisonResult, path: Path) -> None:
    """Forgetting against utility, one point a method, error bars of a standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # The whole, and the corner where those are that forget and keep.
    figure, panels = plt.subplots(1, 2, figsize=(13, 6.2), dpi=120)
    points = [(name, merit(measures)) for name, measures, _ in _rows(result) if measures]
    colors = [*plt.get_cmap("tab20").colors, *plt.get_cmap("Dark2").colors]  # type: ignore
    for axes, corner in zip(panels, (False, True), strict=True):
        for i, (name, (leak, leak_std, utility, utility_std)) in enumerate(points):
            ours = name.startswith("cipo") or name == "retrain"
            axes.errorbar(
                leak,
                utility,
                xerr=leak_std,
                yerr=utility_std,
                fmt="*" if ours else "os^Dv"[i % 5],
                markersize=13 if ours else 7,
                color="black" if name in ("before", "retrain") else colors[i % len(colors)],
                capsize=2,
                label=name,
            )
        axes.set_xlabel("greatest leak: CoT, answer, ZeroThink, LessThink (%), lower is better")
        axes.set_xlim(*((-1, 21) if corner else (-4, 104)))
        axes.set_ylim(*((69, 101.5) if corner else (-4, 104)))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("harmonic mean of retain and reasoning accuracy (%)")
    panels[1].set_title("the corner at the upper left", fontsize=9)
    panels[1].legend(bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


# What fits on a terminal: measures that are shown, under short headings.
_NARROW = {
    "cot_leak": "CoT", "answer_leak": "answer", "zero_leak": "Zero", "less_leak": "Less",
    "think_completion": "closed", "retain": "retain", "reasoning": "reason", "ks": "KS p",
    "kl": "KL", "seconds": "s",
}  # fmt: skip


def print_comparison(result: ComparisonResult, config: Config) -> None:
    """Prints the means to the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = [key for key, _ in _shown(result) if key in _NARROW]
    table = Table(title="Leaks in %, lower is better; the rest in %, higher is better")
    table.add_column("method", no_wrap=True)
    for key in shown:
        table.add_column(_NARROW[key], justify="right", no_wrap=True)
    for name, measures, _ in _rows(result):
        table.add_row(escape(name), *(_cell(key, measures.get(key), False) for key in shown))
    console = Console()
    console.width = max(console.width, 24 + 9 * len(shown))  # A cut number would be no number.
    console.print(table)
    print(budget_line(config, result))


def print_sequence(result: SequenceResult) -> None:
    """Prints a line a request: leak of all so far, of this one, retain and reasoning."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Requests one after another")
    headings = ("forgotten", "CoT leak of all ↓", "answer leak of all ↓", "leak of this one ↓")
    for heading in (*headings, "retain ↑", "reasoning ↑"):
        table.add_column(heading, justify="right")
    table.add_row("0", *_sequence_cells(result.before, ""))
    people = 0
    for request in result.requests:
        people += len(request.people)
        table.add_row(str(people), *_sequence_cells(request.all, _percent(request.own_leak)))
    Console().print(table)


def _sequence_cells(scores: Scores, own: str) -> list[str]:
    forget: ForgetScores | None = scores.forget
    kept: list[AccuracyScores | None] = [scores.retain, scores.reasoning]
    return [
        _percent(forget.cot_leak if forget else None),
        _percent(forget.answer_leak if forget else None),
        own,
        *(_percent(split.accuracy if split else None) for split in kept),
    ]


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"
