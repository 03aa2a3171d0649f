"""One phase of optimization on the host: steps, checkpoints, a clean stop."""

import dataclasses
import math
from collections.abc import Callable

import jax

from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.objective import Batch, Metrics
from cipo_jax.training.optimizer import Schedule
from cipo_jax.training.step import PhaseResult, TrainState, TrainStep
from cipo_jax.typing import Array, Params


class Diverged(Exception):
    """The loss or the gradient stopped being a finite number."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A number of steps with an optimizer of their own.

    Attributes:
      name: of its checkpoints.
      step: the update.
      schedule: of the learning rate; None where the optimizer is not an `AdamW`.
      num_steps: steps of the phase.
      checkpoint_every: steps between two checkpoints.
      key: base key of the adapters' dropout; None where there is none.
    """

    name: str
    step: TrainStep
    schedule: Schedule | None
    num_steps: int
    checkpoint_every: int
    key: Array | None = None


def _ignore(*args: object) -> None:
    del args


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """What a phase reports while it runs. By default nothing happens.

    Attributes:
      on_step: gets the number of steps done and the metrics of the last of them, once a step.
      on_save: called after each checkpoint of a step.
      should_stop: asked after every step; if true the state is saved and the phase ends.
    """

    on_step: Callable[[int, dict[str, float]], None] = _ignore
    on_save: Callable[[], None] = _ignore
    should_stop: Callable[[], bool] = lambda: False


def train_phase(
    phase: Phase,
    initial: PhaseResult | Callable[[], PhaseResult],
    batch_at: Callable[[int], Batch],
    checkpoints: Checkpoints,
    callbacks: Callbacks | None = None,
    frozen: Params = None,
) -> PhaseResult | None:
    """Optimizes parameters for the steps of a phase, resuming from its last checkpoint if any.

    The metrics of step i are read while step i + 1 runs, so the host does not hold up the device.

    Args:
      phase: the update and its numbers.
      initial: what the phase starts from: parameters, their moving average (the parameters by
        default) and the objective's named numbers (its own by default). A callable is called only
        if the phase has no checkpoint, and gives its arrays up, so that no second copy of them
        lives; otherwise they are copied.
      batch_at: the batch of a step, a pure function of the step's number.
      checkpoints: those of the run. The result is not saved here; see `Checkpoints.save_phase`.
      callbacks: of the run.
      frozen: base parameters in the compute dtype, where the step needs them.

    Returns:
      The result of the phase; None if it was asked to stop.

    Raises:
      Diverged: naming the step; the last good checkpoint stays.
    """
    callbacks = callbacks or Callbacks()
    done = checkpoints.latest_step(phase.name)
    if done is None:
        state, done = _start(phase, initial), 0
    else:
        state = checkpoints.load_step(phase.name, done, phase.step.abstract_state())
    del initial  # Its arrays may be large.

    pending = _PendingMetrics(phase.name, checkpoints, callbacks)
    while done < phase.num_steps:
        batch = phase.step.put(batch_at(done))
        state, metrics = phase.step(state, batch, frozen, phase.key)
        pending.report()
        done += 1
        pending.put(done, metrics)
        stop = callbacks.should_stop()
        if stop or (done % phase.checkpoint_every == 0 and done < phase.num_steps):
            pending.report()
            checkpoints.save_step(phase.name, done, state)
            callbacks.on_save()
        if stop:
            return None
    pending.report()
    return state.result()


def _start(phase: Phase, initial: PhaseResult | Callable[[], PhaseResult]) -> TrainState:
    donate = not isinstance(initial, PhaseResult)
    result = initial() if callable(initial) else initial
    return phase.step.init(
        result.params,
        ema=result.ema,
        schedule=phase.schedule,
        aux_state=result.aux_state or None,
        donate=donate,
    )


class _PendingMetrics:
    """The metrics of the last step, which are read later: reading them waits for the device."""

    def __init__(self, name: str, checkpoints: Checkpoints, callbacks: Callbacks):
        self._name, self._checkpoints, self._callbacks = name, checkpoints, callbacks
        self._pending: tuple[int, Metrics] | None = None

    def put(self, step: int, metrics: Metrics) -> None:
        self._pending = (step, metrics)

    def report(self) -> None:
        """Checks and reports the pending metrics, if any; raises Diverged."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        _check_finite(self._name, step, values, self._checkpoints)
        self._callbacks.on_step(step, values)


def _check_finite(
    name: str, step: int, metrics: dict[str, float], checkpoints: Checkpoints
) -> None:
    bad = [k for k in ("loss", "grad_norm") if not math.isfinite(metrics[k])]
    if bad:
        last = checkpoints.latest_step(name)
        kept = f"the checkpoint of step {last}" if last else "the checkpoint before this phase"
        raise Diverged(
            f"{name}: {bad[0]} is {metrics[bad[0]]} at step {step}; {kept} is kept. "
            "Lower the learning rate, or look at the batch of that step"
        )
