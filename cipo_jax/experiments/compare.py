"""Methods side by side: the same data, the same budget to be tuned, several seeds, one table.

Every trial is a run of its own in a folder of its own, so that a comparison that is stopped
anywhere goes on where it was. The learning rate is chosen with seed 0, by validation, among the
same candidates for every method; the iteration, by validation, in every trial.
"""

import contextlib
import dataclasses
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from cipo_jax.config import CompareConfig, Config
from cipo_jax.data.records import Record, field, write_record
from cipo_jax.errors import UserError
from cipo_jax.experiments.comparison_measures import (
    MEASURES,
    Measures,
    Retrained,
    measure,
    measure_retrained,
)
from cipo_jax.experiments.comparison_rows import CompareRow, learning_rates, rows_of
from cipo_jax.experiments.unlearn import derive_run, open_run
from cipo_jax.progress import Reporter
from cipo_jax.runs import locks
from cipo_jax.runs.context import Run
from cipo_jax.runs.evaluation import IterationRecord, export, open_retrained, rank_scores, select
from cipo_jax.runs.identity import digest
from cipo_jax.runs.measurement import IterationsOnly
from cipo_jax.runs.memory import peak_memory_bytes, reset_peak_memory
from cipo_jax.runs.results import StageResult
from cipo_jax.runs.worker_pool import run_workers
from cipo_jax.settings_text import to_literal
from cipo_jax.shared_config import RunConfig
from cipo_jax.training.loop import Diverged

_TRAINING = ("warmup", "rollouts", "pairs", "train")  # Stages that a method's seconds are of.


@dataclasses.dataclass(frozen=True)
class Tried(Record):
    """Validation scores of a learning rate."""

    lr: float = field("the learning rate")
    iteration: int = field("the best iteration; 0 where none was validated")
    leak: float = field("its leak")
    clean: bool = field("whether the leak is within config.selection.leak_goal")
    utility: float = field("its utility")
    diverged: bool = field("whether the loss stopped being a number")


@dataclasses.dataclass(frozen=True)
class Measured(Record):
    """A measure over seeds."""

    mean: float = field("mean over seeds")
    std: float = field("standard deviation of a sample; 0 for one seed")
    values: tuple[float, ...] = field("of each seed")


@dataclasses.dataclass(frozen=True)
class TableRow(Record):
    """A row of the table."""

    name: str = field("name of the row")
    method: str = field("its method")
    about: str = field("what the method is")
    changes: tuple[str, ...] = field("its settings that differ, as key=value")
    lr: float | None = field("the learning rate that was chosen; null for none")
    tried: tuple[Tried, ...] = field("the learning rates that were tried")
    measures: dict[str, Measured] = field("by the names of comparison_measures.MEASURES")
    diverged: int = field("seeds whose loss stopped being a number at some time")


@dataclasses.dataclass(frozen=True)
class ComparisonResult(Record):
    """A whole comparison."""

    schema: ClassVar[str] = "comparison"
    stored_in: ClassVar[tuple[str, ...]] = ("comparison.json",)

    before: Measures = field("the model before")
    retrained: Measures | None = field("the retrained model, where there is one")
    rows: tuple[TableRow, ...] = field("in the order of the config")
    n: dict[str, int] = field("test questions by split")
    lrs: dict[str, tuple[float, ...]] = field("the learning rates that each row could try")
    seeds: int = field("seeds of each row")
    seconds: float = field("of all stages of all runs")


@dataclasses.dataclass(frozen=True)
class Memory(StageResult):
    """Peak memory of a trial."""

    schema: ClassVar[str] = "memory"

    peak_bytes: int = field("of the process, since the trial began")


@dataclasses.dataclass(frozen=True)
class Divergence(StageResult):
    """The end of a trial whose loss stopped being a number."""

    schema: ClassVar[str] = "divergence"

    message: str = field("the step and the quantity")


@dataclasses.dataclass(frozen=True)
class TrialScores(StageResult):
    """Test scores of the kept iteration of a trial."""

    schema: ClassVar[str] = "trial_scores"

    measures: Measures = field("scores of the kept iteration")
    steps: int = field("update steps of the trial")
    seconds: float = field("of training, sampling and sampling of targets")
    peak_gib: float = field("peak memory in GiB")
    iteration: int = field("the iteration that was kept")

    def present(self) -> dict[str, float]:
        """All measures of the table that there are."""
        more = {"steps": self.steps, "seconds": self.seconds, "peak_gib": self.peak_gib}
        return self.measures.present() | more


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run of a row with a learning rate and a seed.

    Attributes:
      run: its run.
      best: the iteration that validation keeps; None where none was validated.
      diverged: whether the loss stopped being a number at some time.
    """

    run: Run
    best: IterationRecord | None
    diverged: bool

    def tried(self, lr: float) -> Tried:
        best = self.best
        if best is None:
            return Tried(lr, 0, 1.0, False, 0.0, self.diverged)
        return Tried(lr, best.iteration, best.leak, best.clean, best.utility, self.diverged)


def note_peak_memory(run: Run) -> Memory:
    """Stage: peak memory of the process since it was last reset."""
    del run
    return Memory(peak_memory_bytes())


def note_divergence(run: Run, message: str) -> Divergence:
    """Stage: records why a trial ended."""
    del run
    return Divergence(message)


def score_trial(
    run: Run, best: IterationRecord, retrained: Retrained | None, shared_seconds: float
) -> TrialScores:
    """Stage: measures the kept iteration of a trial."""
    measures = measure(run, best.weights, run.workspace.data.test, retrained)
    spent = [s for name, s in run.ledger.seconds().items() if name.rsplit("/", 1)[-1] in _TRAINING]
    trained = [run.ledger.result(name) for name in run.ledger.names()]
    steps = max((row["steps"] for row in trained if "steps" in row), default=0)
    peak = run.ledger.result("memory")["peak_bytes"] / 2**30
    return TrialScores(measures, steps, sum(spent) + shared_seconds, peak, best.iteration)


class Comparison:
    """All trials of a comparison, and what they share."""

    def __init__(self, config: Config, workdir: str, reporter: Reporter, claim: bool = True):
        """Opens the folder; trains nothing yet.

        Args:
          config: every setting.
          workdir: the run folder.
          reporter: the terminal.
          claim: whether to keep other processes out of the folder.
        """
        self.rows, self._settings, self._config = rows_of(config), config.compare, config
        self._rates = learning_rates(config, self.rows)
        # A trial does not depend on which others there are: more methods, seeds or rates may be
        # asked for later, in the same folder.
        plain = dataclasses.replace(config, method="cipo", compare=CompareConfig())
        self._plain = plain
        _, self.run = open_run(plain, workdir, reporter, claim)
        for row in self.rows:  # Before anything is trained.
            row.entry.trainable(row.config(plain), self.run.workspace.model.config)
        self.run.preemption.install_signal_handlers()
        self._quiet = Reporter(quiet=True)
        self._owners: dict[str, Run] = {}
        self._retrained: Retrained | None = None

    def compare(self) -> ComparisonResult:
        """Everything; also writes comparison.json."""
        run, test = self.run, self.run.workspace.data.test
        self._retrained = self._measure_retrained()  # First: distances are measured from it.
        before = run.stage("before", measure, run.base, test, self._retrained)
        run.state.weights.clear()
        if self._settings.workers > 1:
            arguments = (self._config, str(run.folder))
            run_workers(_work_on_rows, arguments, run, self._settings.workers)
        rows = []
        for row in self.rows:
            if row.entry.trains:
                rows.append(self._table_row(row))
                self._report(rows[-1])
            elif self._retrained is not None:
                measures = self._retrained.measures.measures.present()
                rows.append(table_row(row, [measures], None, (), 0))
        result = ComparisonResult(
            before=before,
            retrained=self._retrained.measures.measures if self._retrained else None,
            rows=tuple(rows),
            n=test.counts(),
            lrs={row.name: self._rates[row.name] for row in self.rows},
            seeds=self._settings.seeds,
            seconds=_all_seconds(run.folder),
        )
        write_record(run.path("comparison.json"), result)
        return result

    def work(self) -> None:
        """The trials of every row that no other process is at, for processes side by side."""
        self._retrained = self._measure_retrained()
        with contextlib.ExitStack() as held:
            for row in self.rows:
                if row.entry.trains and self._take(row, held):
                    self._table_row(row)

    def _take(self, row: CompareRow, held: contextlib.ExitStack) -> bool:
        """Takes a row for this process, until it ends; False where another has it."""
        path = self.run.folder / "runs" / row.folder / ".lock"
        try:
            return locks.try_acquire(path, held)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be locked here ({error.strerror}); use one process: "
                "--config.compare.workers=1"
            ) from None

    def _measure_retrained(self) -> Retrained | None:
        """The retrained model, where there is one for this very forget set."""
        model = open_retrained(self.run)
        if model is None:
            return None
        test = self.run.workspace.data.test
        measures = self.run.stage("retrained", measure_retrained, model, test)
        return Retrained(model, model.load_params(), measures)

    # ---- trials

    def _table_row(self, row: CompareRow) -> TableRow:
        """A row's learning rate, and the scores with every seed."""
        lr, tried = self._tune(row)
        finals = [self._final(row, lr, seed) for seed in range(self._settings.seeds)]
        scores = [final.present() for final, _ in finals if final is not None]
        diverged = sum(diverged for _, diverged in finals)
        return table_row(row, scores, lr, tried, diverged)

    def _tune(self, row: CompareRow) -> tuple[float, tuple[Tried, ...]]:
        """The learning rate to take, and what each came to in validation."""
        lrs = self._rates[row.name]
        if len(lrs) == 1:
            return lrs[0], ()
        tried = tuple(self._trial(row, lr, 0).tried(lr) for lr in lrs)
        # As iterations are chosen; of equals the one that is listed first.
        best = max(reversed(tried), key=lambda t: rank_scores(t.clean, t.leak, t.utility))
        for t in tried:
            if t.lr != best.lr:
                self._drop_weights(row, t.lr, 0)
        return best.lr, tried

    def _folder(self, row: CompareRow, lr: float, seed: int) -> Path:
        return self.run.folder / "runs" / row.folder / f"lr-{lr:g}-seed-{seed}"

    def _trial(self, row: CompareRow, lr: float, seed: int) -> Trial:
        """Runs a method once, or goes on with it."""
        config = row.config(self._plain)
        train = dataclasses.replace(config.train, lr=lr)
        config = dataclasses.replace(config, seed=seed, train=train)
        folder = self._folder(row, lr, seed)
        method, run = derive_run(self.run, config, folder, self._quiet)
        run = run.shared(lambda name: self._owner(config, name))
        reset_peak_memory()
        label = f"{row.name:<24} lr {lr:<8g} seed {seed}"
        try:
            if "diverged" not in run.ledger:
                method.run(run, IterationsOnly())
        except Diverged as error:
            run.stage("diverged", note_divergence, str(error))
            self.run.reporter.line(f"{label}  {error}")
        finally:
            run.metrics.close()
        history = _validated(run)
        diverged = "diverged" in run.ledger
        if not history:
            return Trial(run, None, diverged)
        known, best = "memory" in run.ledger, select(history)
        run.stage("memory", note_peak_memory)
        if not known:
            self.run.reporter.line(
                f"{label}  round {best.iteration} of {len(history)}  leak {best.leak:.1%}  "
                f"utility {best.utility:.3f}"
            )
        return Trial(run, best, diverged)

    def _final(self, row: CompareRow, lr: float, seed: int) -> tuple[TrialScores | None, bool]:
        """What a trial's kept iteration comes to on the test questions, and whether it diverged."""
        trial = self._trial(row, lr, seed)
        run, best, keeps = trial.run, trial.best, self._settings.keep_models
        if best is None:
            return None, trial.diverged
        wanted = {"scores", "export"} if keeps else {"scores"}
        done = all(stage in run.ledger for stage in wanted)
        if not done and not run.checkpoints.has_phase(best.weights.name):
            # The weights were dropped when nobody seemed to need them: train it again.
            shutil.rmtree(run.folder)
            return self._final(row, lr, seed)
        shared = [self._owner(run.config, name) for name in run.state.used]
        seconds = sum(o.ledger.seconds()[o.folder.name] for o in shared if o is not None)
        if "scores" in run.ledger:  # Clocks of other processes may have gone on since.
            final = TrialScores.load(run.path("scores"), run.ledger.result("scores"))
        else:
            final = run.stage("scores", score_trial, best, self._retrained, seconds)
        if keeps:
            export(run, best.weights)
        else:
            self._drop_weights(row, lr, seed)
        run.state.weights.clear()
        return final, trial.diverged

    def _drop_weights(self, row: CompareRow, lr: float, seed: int) -> None:
        """Drops a trial's weights, which nobody needs any more."""
        if not self._settings.keep_models:
            shutil.rmtree(self._folder(row, lr, seed) / "checkpoints", ignore_errors=True)

    def _owner(self, config: RunConfig, stage: str) -> Run | None:
        """The run that keeps a stage of what trials of one seed learn from; None for others."""
        shared = stage in ("own", "counterfactuals", "refusals") or stage.startswith("alternates-")
        if not shared:
            return None
        plain = dataclasses.replace(
            self._plain, seed=config.seed, counterfactual=config.counterfactual
        )
        settings = digest(json.dumps(dataclasses.asdict(config.counterfactual), sort_keys=True))
        key = f"seed-{config.seed}-{settings[:6]}/{stage}"
        if key not in self._owners:
            folder = self.run.folder / "materials" / key
            self._owners[key] = derive_run(self.run, plain, folder, self._quiet)[1]
        return self._owners[key]

    def _report(self, row: TableRow) -> None:
        m = row.measures
        if not m:
            self.run.reporter.line(f"{row.name:<24} diverged with every seed")
            return
        note = f"; diverged with {row.diverged} seeds" if row.diverged else ""
        shown = ", ".join(
            f"{label} {m[key].mean:.1%}" if key in m else f"{label} n/a"
            for key, label in (
                ("cot_leak", "CoT leak"),
                ("answer_leak", "answer leak"),
                ("retain", "retain"),
                ("reasoning", "reasoning"),
            )
        )
        self.run.reporter.line(f"{row.name:<24} {shown}{note}")


def _work_on_rows(config: Config, workdir: str) -> None:
    """What a process of the worker pool does."""
    Comparison(config, workdir, Reporter(), claim=False).work()


def _validated(run: Run) -> list[IterationRecord]:
    """The iterations that were validated, in order; also those before a divergence."""
    names = sorted(name for name in run.ledger.names() if name.endswith("/validate"))
    return [IterationRecord.load(run.path(name), run.ledger.result(name)) for name in names]


def table_row(
    row: CompareRow,
    scores: Sequence[Mapping[str, float]],
    lr: float | None,
    tried: tuple[Tried, ...],
    diverged: int,
) -> TableRow:
    """A row of the table from the measures of its seeds.

    Args:
      row: its name and settings.
      scores: measures of each seed that has any.
      lr: the learning rate that was chosen.
      tried: the learning rates that were tried.
      diverged: seeds whose loss stopped being a number.
    """
    measures = {}
    for key, _, _ in MEASURES:
        values = tuple(score[key] for score in scores if key in score)
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            measures[key] = Measured(statistics.mean(values), spread, values)
    return TableRow(
        name=row.name,
        method=row.method,
        about=row.entry.about,
        changes=tuple(f"{key}={to_literal(value)}" for key, value in row.changes),
        lr=lr,
        tried=tried,
        measures=measures,
        diverged=diverged,
    )


def _all_seconds(folder: Path) -> float:
    """Seconds of every stage of every run under a folder."""
    spent = 0.0
    for path in sorted(folder.glob("**/stages.json")):
        state = json.loads(path.read_text(encoding="utf-8"))
        spent += sum(stage["seconds"] for stage in state["stages"].values())
        spent += state["startup_seconds"]
    return spent
