"""Measurement around a method: of the base model, and of the iteration that is kept."""

from collections.abc import Sequence
from typing import Protocol

from cipo_jax.runs.context import Run
from cipo_jax.runs.evaluation import (
    Evaluation,
    IterationRecord,
    Result,
    conclude,
    evaluate,
    select,
)


class Measurement(Protocol):
    """Called by a method at its two ends."""

    def before(self, run: Run) -> Evaluation | None:
        """Measures the model before training, or nothing."""
        ...

    def after(
        self, run: Run, before: Evaluation | None, history: Sequence[IterationRecord]
    ) -> Result:
        """Measures and exports the iteration that is kept, or only says which one it is."""
        ...


class FullMeasurement:
    """Scores before and after on the test questions, fluency, and the export: `unlearn`."""

    def before(self, run: Run) -> Evaluation:
        return run.stage("evals/before", evaluate, run.base, run.workspace.data.test)

    def after(
        self, run: Run, before: Evaluation | None, history: Sequence[IterationRecord]
    ) -> Result:
        assert before is not None
        return conclude(run, before, history)


class IterationsOnly:
    """The iterations alone, for experiments with measurements of their own."""

    def before(self, run: Run) -> None:
        del run

    def after(
        self, run: Run, before: Evaluation | None, history: Sequence[IterationRecord]
    ) -> Result:
        del before
        best = select(history).iteration
        return Result(run.config.method, None, None, None, tuple(history), best, None)
