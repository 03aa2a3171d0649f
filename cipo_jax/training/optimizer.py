"""AdamW with warm-up, learning-rate schedule and clipping; the schedule's numbers are data.

The schedule is part of the optimizer's state, so phases of other lengths and learning rates share
one compiled update.
"""

import dataclasses
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from cipo_jax.shared_config import TrainConfig
from cipo_jax.typing import Array, Params

LrSchedule = Literal["constant", "linear", "cosine"]


class Schedule(NamedTuple):
    """Position and numbers of a learning-rate schedule.

    Attributes:
      done: steps taken.
      lr: the peak learning rate.
      warmup_steps: steps of linear warm-up.
      num_steps: steps of the phase, at which a decaying schedule reaches zero.
    """

    done: int | Array = 0
    lr: float | Array = 0.0
    warmup_steps: int | Array = 0
    num_steps: int | Array = 1

    @classmethod
    def from_config(cls, settings: TrainConfig, num_steps: int) -> "Schedule":
        """The schedule of a phase of `num_steps` steps; a shorter phase has a shorter warm-up."""
        return cls(0, settings.lr, min(settings.warmup_steps, max(num_steps - 1, 0)), num_steps)

    def as_arrays(self) -> "Schedule":
        """The same with int32 and float32 arrays, as the optimizer's state holds them."""
        done, warmup_steps, num_steps = (
            jnp.asarray(n, jnp.int32) for n in (self.done, self.warmup_steps, self.num_steps)
        )
        return Schedule(done, jnp.asarray(self.lr, jnp.float32), warmup_steps, num_steps)


def learning_rate(schedule: Schedule, lr_schedule: LrSchedule) -> Array:
    """Linear warm-up, then "constant", or "linear" or "cosine" decay to zero at `num_steps`."""
    done, lr, warmup, num_steps = (jnp.asarray(n, jnp.float32) for n in schedule)
    rest = jnp.maximum(num_steps - warmup, 1.0)
    part = jnp.clip((done - warmup) / rest, 0.0, 1.0)
    factor = {
        "constant": jnp.ones_like(part),
        "linear": 1.0 - part,
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * part)),
    }[lr_schedule]
    # The first step already moves: warm-up starts at lr / (warmup + 1), not at zero.
    rise = jnp.minimum((1.0 + done) / (1.0 + warmup), 1.0)
    return lr * jnp.where(done < warmup, rise, factor)


def clip_by_global_norm(updates: Params, max_norm: float) -> Params:
    """Scales all gradients down together where their norm exceeds `max_norm`.

    optax's divides and selects, for which XLA makes a second copy of all gradients; one product
    fuses into the operations that follow.
    """
    scale = max_norm / jnp.maximum(optax.global_norm(updates), max_norm)
    return jax.tree.map(lambda u: (scale * u).astype(u.dtype), updates)


def decays(params: Params) -> Params:
    """The mask of weight decay: true for matrices, false for norm scales and biases."""

    # By name: stacked layers add an axis, so the number of dimensions is no criterion.
    def is_matrix(path, x):
        del x
        return path[-1].key not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


class AdamWState(NamedTuple):
    """First and second moments (optax's, with `mu` and `nu`), and the schedule."""

    moments: optax.OptState
    schedule: Schedule


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101).

    A value: equal optimizers share a compiled update. `init` and `update` are those of an
    `optax.GradientTransformation`, except that `init` takes the schedule as well.

    Attributes:
      b1: decay of the first moment.
      b2: decay of the second moment.
      weight_decay: of matrices; norm scales and biases have none.
      max_grad_norm: global norm to which gradients are clipped; 0 for no clipping.
      lr_schedule: shape of the learning rate after warm-up; see `learning_rate`.
    """

    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_schedule: LrSchedule = "constant"

    @classmethod
    def from_config(cls, settings: TrainConfig) -> "AdamW":
        """The optimizer of a training config; see `Schedule.from_config` for its numbers."""
        return cls(
            settings.b1,
            settings.b2,
            settings.weight_decay,
            settings.max_grad_norm,
            settings.lr_schedule,
        )

    def init(self, params: Params, schedule: Schedule | None = None) -> AdamWState:
        """Zero moments, and the schedule; without one the learning rate is zero."""
        moments = cast(optax.ScaleByAdamState, self._adam.init(params))
        return AdamWState(moments, (schedule or Schedule()).as_arrays())

    def update(
        self, updates: Params, state: AdamWState, params: Params
    ) -> tuple[Params, AdamWState]:
        """Gradients to the differences that `optax.apply_updates` adds to the parameters."""
        if self.max_grad_norm:
            updates = clip_by_global_norm(updates, self.max_grad_norm)
        updates, moments = self._adam.update(updates, state.moments, params)
        decay = optax.add_decayed_weights(self.weight_decay, mask=decays)
        updates, _ = decay.update(updates, decay.init(params), params)
        rate = learning_rate(state.schedule, self.lr_schedule)
        updates = jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates)
        schedule = state.schedule._replace(done=state.schedule.done + 1)
        return updates, AdamWState(cast(optax.ScaleByAdamState, moments), schedule)

    @property
    def _adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2)


Optimizer = AdamW | optax.GradientTransformation
