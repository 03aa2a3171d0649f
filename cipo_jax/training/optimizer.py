"""AdamW with warm-up, decay and clipping, from optax; the schedule's numbers are data."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cipo_jax.config import TrainConfig
from cipo_jax.typing import Array, Params


class Plan(NamedTuple):
    """Where a schedule is, and what it goes by: numbers of the optimizer's state.

    Phases of other lengths and learning rates then share one compiled update.
    """

    done: Array  # steps
    lr: Array
    warmup: Array  # steps
    steps: Array


def learning_rate(plan: Plan, decay: str) -> Array:
    """Linear warm-up, then "constant", or "linear" or "cosine" decay to zero at `steps`."""
    done, warmup = plan.done.astype(jnp.float32), plan.warmup.astype(jnp.float32)
    rest = jnp.maximum(plan.steps.astype(jnp.float32) - warmup, 1.0)
    part = jnp.clip((done - warmup) / rest, 0.0, 1.0)
    factor = {
        "constant": jnp.ones_like(part),
        "linear": 1.0 - part,
        "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * part)),
    }[decay]
    # The first step already moves: warm-up starts at lr / (warmup + 1), not at zero.
    rise = jnp.minimum((1.0 + done) / (1.0 + warmup), 1.0)
    return plan.lr * jnp.where(done < warmup, rise, factor)


def _plan(config: TrainConfig, steps: int) -> Plan:
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    done, rises, steps_ = (jnp.asarray(n, jnp.int32) for n in (0, warmup, steps))
    return Plan(done, jnp.asarray(config.lr, jnp.float32), rises, steps_)


def make_schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Learning rate of each of a phase's steps."""
    plan = _plan(config, steps)
    return lambda step: learning_rate(plan._replace(done=jnp.asarray(step)), config.decay)


def scale_by_schedule(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Turns directions into steps down the loss, of the length that the schedule says."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Plan]:
        del params
        plan: Plan = state
        rate = learning_rate(plan, config.decay)
        updates = jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates)
        return updates, plan._replace(done=plan.done + 1)

    return optax.GradientTransformation(lambda params: _plan(config, steps), update)


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Scales all gradients down together where their norm exceeds `largest`.

    optax's divides and selects, for which XLA makes a second copy of all gradients; one product
    goes into what follows.
    """

    def update(updates: Params, state: Any, params: Params = None) -> tuple[Params, Any]:
        del params
        scale = largest / jnp.maximum(optax.global_norm(updates), largest)
        return jax.tree.map(lambda u: (scale * u).astype(u.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of one phase. Weight decay leaves vectors (norm scales, biases) alone."""

    def decayed(params: Params) -> Params:
        # By name: stacked layers add an axis, so the number of dimensions tells nothing.
        def is_matrix(path, x):
            del x
            return path[-1].key not in ("scale", "bias")

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    parts = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        scale_by_schedule(config, steps),
    ]
    if config.clip:
        parts.insert(0, clip_by_global_norm(config.clip))
    return optax.chain(*parts)
