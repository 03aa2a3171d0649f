"""One phase of optimization on the host: steps, checkpoints, a clean stop."""

import math
from collections.abc import Callable
from typing import Any

import jax

from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.step import Batch, Trainer
from cipo_jax.typing import Params


class Diverged(Exception):
    """The loss or the gradient stopped being a number."""


def run_phase(
    name: str,
    trainer: Trainer,
    update: Callable[..., Any],
    start: dict[str, Params],
    batch_at: Callable[[int], Batch],
    steps: int,
    checkpoints: Checkpoints,
    checkpoint_every: int,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    on_save: Callable[[], None] = lambda: None,
    stop_asked: Callable[[], bool] = lambda: False,
    frozen: Params | None = None,
) -> dict[str, Params] | None:
    """Optimizes parameters for `steps` steps, going on from the phase's last checkpoint.

    The metrics of step i are read while step i + 1 runs, so the host does not hold the device up.

    Args:
      name: of the phase, for its checkpoints.
      trainer: whose state is trained.
      update: `trainer.make_update()`, made once and shared by phases of one kind.
      start: {"params"} and, where the trainer keeps a moving average, {"ema"}.
      batch_at: the batch of a step, by step number alone.
      steps: number of steps.
      checkpoints: where to.
      checkpoint_every: steps between two checkpoints.
      on_step: called with the number of steps done and the metrics of the last of them.
      on_save: called after each checkpoint.
      stop_asked: asked after every step; if true the state is saved and None returned.
      frozen: the base of adapters; None where all parameters are trained.

    Returns:
      What the phase ends with, in the form of `start`; None if it was asked to stop.

    Raises:
      Diverged: naming the step; the last good checkpoint stays.
    """
    done = checkpoints.latest_step(name)
    if done is None:
        state, done = trainer.init(**start), 0
    else:
        state = checkpoints.load_step(name, done, trainer.abstract_state())

    pending: tuple[int, Any] | None = None

    def settle() -> None:
        nonlocal pending
        if pending is None:
            return
        step, metrics = pending
        pending = None
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        bad = [k for k in ("loss", "grad_norm") if not math.isfinite(values[k])]
        if bad:
            last = checkpoints.latest_step(name)
            kept = f"the checkpoint of step {last}" if last else "the checkpoint before this phase"
            raise Diverged(
                f"{name}: {bad[0]} is {values[bad[0]]} at step {step}; {kept} is kept. "
                "Lower the learning rate, or look at the batch of that step"
            )
        on_step(step, values)

    while done < steps:
        state, metrics = update(state, frozen or {}, trainer.put(batch_at(done)))
        settle()
        done += 1
        pending = (done, metrics)
        stop = stop_asked()
        if stop or (done % checkpoint_every == 0 and done < steps):
            settle()
            checkpoints.save_step(name, done, state)
            on_save()
        if stop:
            return None
    settle()
    return {k: state[k] for k in ("params", "ema") if k in state}
