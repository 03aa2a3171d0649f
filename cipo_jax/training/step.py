"""The update step: one jitted, donated, mesh-sharded pure function for every objective.

    step = TrainStep(policy, objective, AdamW(), mesh)
    state = step.init(params, schedule=Schedule(lr=1e-5))
    for batch in batches:
        state, metrics = step(state, step.put(batch))

A `TrainStep` is a value: it is a static argument of the one jitted update function, so equal steps
share one compiled program. Everything that may differ between phases of one program is an argument
or part of the state.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, Sharding

from cipo_jax.data.batches import CompletionBatch
from cipo_jax.models.decoder import abstract_params
from cipo_jax.models.lora import Lora
from cipo_jax.models.trainable import Trainable, abstract_trainable, assemble
from cipo_jax.training.mesh import abstract_on, batch_sharding, replicated
from cipo_jax.training.objective import Batch, Metrics, Objective, StepContext
from cipo_jax.training.optimizer import AdamW, Optimizer, Schedule
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params

_Gradients = tuple[Params, Metrics]


@struct.dataclass
class TrainState:
    """What the update step takes and returns.

    Attributes:
      params: the trained parameters, float32: all of the model's, or a part of them.
      opt_state: of the optimizer.
      step: [] int32, steps taken.
      ema: exponential moving average of `params`; None where none is kept.
      aux_state: the objective's named numbers, [] float32 each.
    """

    params: Params
    opt_state: Any
    step: Any
    ema: Params = None
    aux_state: Any = struct.field(default_factory=dict)

    def result(self) -> "PhaseResult":
        """The part of the state that outlives its phase."""
        return PhaseResult(self.params, self.ema, self.aux_state)


@struct.dataclass
class PhaseResult:
    """What a phase of training ends with, and what the next one may start from.

    Attributes:
      params: the trained parameters.
      ema: their exponential moving average; None where none is kept.
      aux_state: the objective's named numbers; {} where it keeps none.
    """

    params: Params
    ema: Params = None
    aux_state: Any = struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One optimizer step of an objective, as a value.

    Equal steps share one compiled program, whatever their schedules, lengths and keys.

    Attributes:
      policy: the model; `dropout_key` is None.
      objective: the loss.
      optimizer: an `AdamW`, or any `optax.GradientTransformation` (which equals itself alone).
      mesh: the devices.
      trainable: the trained part of the model; None trains all parameters.
      gradient_accumulation_steps: micro-batches that a batch is cut into.
      ema_decay: decay of the exponential moving average of the parameters; None keeps none.
    """

    policy: Policy
    objective: Objective
    optimizer: Optimizer
    mesh: Mesh
    trainable: Trainable = None
    gradient_accumulation_steps: int = 1
    ema_decay: float | None = None

    @property
    def needs_frozen(self) -> bool:
        """Whether a step needs the base parameters, as base of the trained part or reference."""
        return self.trainable is not None or self.objective.needs_reference_params

    @property
    def dropout(self) -> float:
        """Dropout of the adapters' inputs; where it is not 0, a step needs a key."""
        return self.trainable.dropout if isinstance(self.trainable, Lora) else 0.0

    def abstract_trainable(self) -> Params:
        """Shapes, dtypes and shardings of the trained parameters."""
        return abstract_on(self.mesh, abstract_trainable(self.policy.config, self.trainable))

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, without making it."""
        params, everywhere = self.abstract_trainable(), replicated(self.mesh)

        def place(x: Array | jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        opt_state = optax.tree_map_params(
            self.optimizer,  # pyright: ignore[reportArgumentType]  (its init is all that is used)
            place,
            jax.eval_shape(self.optimizer.init, params),
            _shardings(params),
            transform_non_params=lambda x: place(x, everywhere),
        )
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
        return TrainState(
            params=params,
            opt_state=opt_state,
            step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
            ema=None if self.ema_decay is None else params,
            aux_state=dict.fromkeys(self.objective.initial_aux_state(), number),
        )

    def abstract_result(self) -> PhaseResult:
        """Shapes, dtypes and shardings of the result of a phase, without making it."""
        return self.abstract_state().result()

    def init(
        self,
        params: Params,
        *,
        ema: Params = None,
        schedule: Schedule | None = None,
        aux_state: Mapping[str, Array | float] | None = None,
        donate: bool = False,
    ) -> TrainState:
        """A fresh state around parameters.

        Args:
          params: the trained parameters to start from.
          ema: where their moving average starts, if one is kept; `params` by default.
          schedule: of the learning rate; for an `AdamW` alone, which needs one.
          aux_state: the objective's named numbers; `objective.initial_aux_state()` by default.
          donate: gives up the arrays of `params` and `ema`, so that no second copy lives. Otherwise
            they are copied, because the update donates its state.

        Raises:
          ValueError: where the schedule or a named number is missing, or is not used.
        """
        if isinstance(self.optimizer, AdamW) != (schedule is not None):
            raise ValueError("a schedule is for AdamW alone, and AdamW needs one")
        numbers = self.objective.initial_aux_state()
        if aux_state is not None:
            if aux_state.keys() != numbers.keys():
                raise ValueError(f"aux_state has {sorted(aux_state)}, wanted {sorted(numbers)}")
            numbers = aux_state
        numbers = {name: np.float32(value) for name, value in numbers.items()}
        schedule = None if schedule is None else schedule.as_arrays()
        if self.ema_decay is None or ema is params:
            ema = None
        make = jax.jit(
            _make_state,
            static_argnames="step",
            donate_argnames=("params", "ema") if donate else (),
            out_shardings=_shardings(self.abstract_state()),
        )
        return make(self, params, ema, schedule, numbers)

    def put(self, batch: Batch) -> Batch:
        """Places a batch of numpy arrays on the mesh, rows over data and fsdp."""
        return jax.device_put(batch, batch_sharding(self.mesh))

    def __call__(
        self, state: TrainState, batch: Batch, frozen: Params = None, key: Array | None = None
    ) -> tuple[TrainState, Metrics]:
        """One optimizer step on one batch. The state is donated.

        Args:
          state: from `init` or from the step before.
          batch: what the objective takes; see `put`.
          frozen: base parameters in the compute dtype; needed where only a part is trained or the
            objective has a reference, which they are.
          key: base key of the adapters' dropout, the same for all steps; needed where there is
            dropout.

        Returns:
          The next state, with the same shardings, and the objective's metrics with "loss" and
          "grad_norm" (before clipping).

        Raises:
          ValueError: where frozen or the key is missing.
        """
        return self._jitted(state)(self, state, batch, *self._extras(frozen, key))

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The lowered program of a step, without running it.

        Args:
          batch: arrays or shapes.
        """
        rows = batch_sharding(self.mesh)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
        params = abstract_params(self.policy.config)
        dtype = self.policy.compute.dtype
        frozen = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
            abstract_on(self.mesh, params),
        )
        state, extras = self.abstract_state(), self._extras(frozen, jax.random.key(0))
        return self._jitted(state).lower(self, state, batch, *extras)

    def _jitted(self, state: TrainState) -> jax.stages.Wrapped:
        """The jitted update, whose state keeps its shardings.

        A new wrapper at each call is cheap (0.1 ms): jax keeps the programs by function, static
        arguments and shardings, not by wrapper.
        """
        return jax.jit(
            _update,
            static_argnames="step",
            donate_argnames="state",
            out_shardings=(_shardings(state), replicated(self.mesh)),
        )

    def _extras(self, frozen: Params, key: Array | None) -> tuple[Params, Array | None]:
        """`frozen` and `key` where the step needs them, None where it does not."""
        if self.needs_frozen and frozen is None:
            raise ValueError("this step needs `frozen`, the base parameters")
        if self.dropout and key is None:
            raise ValueError("the adapters have dropout: this step needs a key")
        return frozen if self.needs_frozen else None, key if self.dropout else None


def _shardings(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.sharding, tree)


def _make_state(
    step: TrainStep,
    params: Params,
    ema: Params,
    schedule: Schedule | None,
    aux_state: Mapping[str, Array],
) -> TrainState:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    if isinstance(step.optimizer, AdamW):
        opt_state = step.optimizer.init(params, schedule)
    else:
        opt_state = step.optimizer.init(params)
    if step.ema_decay is not None:
        ema = params if ema is None else jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ema)
        ema = jax.tree.map(jnp.copy, ema)
    return TrainState(
        params=jax.tree.map(jnp.copy, params),
        opt_state=opt_state,
        step=jnp.zeros((), jnp.int32),
        ema=ema,
        aux_state=dict(aux_state),
    )


def _update(
    step: TrainStep, state: TrainState, batch: Batch, frozen: Params, key: Array | None
) -> tuple[TrainState, Metrics]:
    policy = step.policy
    if key is not None:
        compute = dataclasses.replace(policy.compute, lora_dropout=step.dropout)
        key = jax.random.fold_in(key, state.step)
        policy = dataclasses.replace(policy, compute=compute, dropout_key=key)
    reference = None
    if step.objective.needs_reference_params:
        reference = jax.lax.stop_gradient(frozen)
    context = StepContext(reference, state.aux_state)

    def loss_fn(trained: Params, batch: Batch) -> tuple[Array, Metrics]:
        params = assemble(step.trainable, frozen, trained)
        loss, metrics = step.objective(policy, params, batch, context)
        return loss, metrics | {"loss": loss}

    grad = jax.grad(loss_fn, has_aux=True)
    gradients, metrics = _accumulated(grad, state.params, batch, step.gradient_accumulation_steps)
    with jax.named_scope("optimizer"):
        updates, opt_state = step.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    ema = None
    if step.ema_decay is not None:
        ema = optax.incremental_update(params, state.ema, 1.0 - step.ema_decay)
    new = TrainState(
        params=params,
        opt_state=opt_state,
        step=state.step + 1,
        ema=ema,
        aux_state=step.objective.update_aux_state(state.aux_state, metrics),
    )
    metrics = metrics | {"grad_norm": optax.global_norm(gradients)}
    return new, metrics


def _accumulated(
    grad: Callable[[Params, Batch], _Gradients], trained: Params, batch: Batch, n: int
) -> tuple[Params, Metrics]:
    """Mean gradient and metrics over n micro-batches."""
    if n == 1:
        return grad(trained, batch)
    micro = _micro_batches(batch, n)

    def body(total: _Gradients, rows: Batch) -> tuple[_Gradients, None]:
        return jax.tree.map(lambda a, b: a + b / n, total, grad(trained, rows)), None

    first = jax.tree.map(lambda x: x[0], micro)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, trained, first))
    return jax.lax.scan(body, zero, micro)[0]


def _micro_batches(batch: Batch, n: int) -> Batch:
    """Every array [B, ...] as [n, B / n, ...], with the divisors of means over the whole batch."""

    def cut(x: Array) -> Array:
        # Row i goes to micro-batch i % n, so that every micro-batch spans all rows of the mesh.
        return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)

    def share(count: Array) -> Array:
        count = jnp.maximum(count, 1).astype(jnp.float32) / n
        return jnp.broadcast_to(count, (n, *count.shape))

    def split(group: CompletionBatch | Array) -> CompletionBatch | Array:
        if not isinstance(group, CompletionBatch):
            return cut(group)
        num_tokens = jnp.sum(group.lengths, axis=0)
        num_sequences = jnp.sum(group.lengths > 0, axis=0)
        rows = CompletionBatch(*(cut(x) for x in group[:4]))
        return rows._replace(num_tokens=share(num_tokens), num_sequences=share(num_sequences))

    return jax.tree.map(split, batch, is_leaf=lambda x: isinstance(x, CompletionBatch))
