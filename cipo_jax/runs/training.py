"""A training phase inside of a stage: from weights to weights, resumable at its checkpoints."""

import dataclasses
import math
from collections.abc import Callable

import jax

from cipo_jax.data.batches import CompletionBatch
from cipo_jax.runs.context import Run
from cipo_jax.runs.weights import Weights
from cipo_jax.shared_config import TrainConfig
from cipo_jax.training.loop import Callbacks, Phase, train_phase
from cipo_jax.training.objective import Batch, Objective
from cipo_jax.training.optimizer import AdamW, Schedule
from cipo_jax.training.step import PhaseResult
from cipo_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a phase.

    Attributes:
      at: from the number of a step, counted from 0, to its batch.
      num_steps: number of steps.
    """

    at: Callable[[int], Batch]
    num_steps: int


def num_steps(settings: TrainConfig, rows: int) -> int:
    """Steps of a phase over so many rows: at least one, none for no epochs."""
    if not settings.epochs:
        return 0
    return max(math.ceil(settings.epochs * rows / settings.batch_size), 1)


def optimize(
    run: Run,
    name: str,
    title: str,
    start: Weights,
    objective: Objective,
    settings: TrainConfig,
    batches: Batches,
    ema_decay: float | None = None,
) -> Weights:
    """Optimizes from the weights `start`; goes on where an earlier process stopped.

    Args:
      run: inside of a stage.
      name: of the checkpoint that it ends with.
      title: of the progress bar.
      start: given up where nobody else needs them: their arrays are donated.
      objective: what is minimized.
      settings: of the optimization.
      batches: of the phase.
      ema_decay: decay of the moving average that is kept; None for none.

    Raises:
      Diverged: where the loss stops being a number.
      Preempted: where the process was asked to stop.
    """
    weights = run.trained_here(
        name,
        start.steps + batches.num_steps,
        ema_decay is not None,
        tuple(objective.initial_aux_state()),
    )
    if run.checkpoints.has_phase(name):  # Killed between the checkpoint and the stage's entry.
        return weights
    phase = _phase(run, name, objective, settings, batches.num_steps, ema_decay)
    ended = _train(run, title, phase, start, batches)
    if ended is None:
        run.stop_if_preempted()
        raise AssertionError("a phase ends early only where the process was asked to stop")
    run.checkpoints.save_phase(name, ended)
    run.state.weights.put(weights, ended)
    return weights


def _phase(
    run: Run,
    name: str,
    objective: Objective,
    settings: TrainConfig,
    num_steps: int,
    ema_decay: float | None,
) -> Phase:
    """The phase of a training config, on the model of the run."""
    step = run.workspace.model.train_step(
        objective,
        AdamW.from_config(settings),
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        ema_decay=ema_decay,
    )
    schedule = Schedule.from_config(settings, num_steps)
    key = jax.random.key(run.config.seed)
    return Phase(name, step, schedule, num_steps, settings.checkpoint_every, key)


def _train(
    run: Run, title: str, phase: Phase, start: Weights, batches: Batches
) -> PhaseResult | None:
    """Trains with the run's metrics, progress bar and checkpoints; None if preempted."""
    done = run.checkpoints.latest_step(phase.name) or 0
    run.metrics.rewind(start.steps + done)
    tokens = _completion_tokens(batches.at(0)) if batches.num_steps else 0
    with run.reporter.bar(title, batches.num_steps) as bar:
        bar.skip(done)

        def on_step(number: int, metrics: dict[str, float]) -> None:
            run.metrics.write(start.steps + number, phase.name, metrics)
            bar.advance(1, tokens, f"loss {metrics['loss']:.3f}")

        return train_phase(
            phase,
            lambda: run.state.weights.take(start),
            batches.at,
            run.checkpoints,
            Callbacks(on_step, run.ledger.save, lambda: run.preemption.preempted),
            frozen=_frozen(run, phase.step.objective),
        )


def _frozen(run: Run, objective: Objective) -> Params:
    """Base parameters in the compute dtype, where adapters, a subset or the objective need them."""
    model = run.workspace.model
    beside = model.trainable is not None or objective.needs_reference_params
    return model.base_params if beside else None


def _completion_tokens(batch: Batch) -> int:
    """Real completion tokens of a batch, roughly the same in each."""
    groups = [g for g in batch.values() if isinstance(g, CompletionBatch)]
    return int(sum(math.fsum(g.lengths.reshape(-1)) for g in groups))
