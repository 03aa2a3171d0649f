"""The update step: one jitted, donated, mesh-sharded pure function for every objective."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cipo_jax.models.decoder import (
    Compute,
    DecoderConfig,
    abstract_params,
    head_matrix,
    hidden_states,
    layer_states,
)
from cipo_jax.models.trainable import Trainable, abstract_trainable, assemble
from cipo_jax.ops.token_logps import token_logps
from cipo_jax.training.mesh import batch_sharding, param_shardings, replicated
from cipo_jax.typing import Array, Float, Int, Params

Metrics = dict[str, Array]
# {"params", "opt_state", "step"} and, where it is wanted, "ema" or "carried". "params" is what is
# trained: all parameters, or a part of them.
State = dict[str, Any]
Batch = dict[str, Any]  # Named groups of `data.batches.CompletionBatch`, and per-row arrays.


@dataclasses.dataclass(frozen=True)
class Policy:
    """What an objective may ask of a model, as functions of (params, batch).

    Attributes:
      config: the model's shape.
      compute: dtype and kernels.
      reference: the model as it came in, for objectives that ask for its distributions or
        activations; None or {} for the others. It gets no gradient.
      carried: numbers that go from step to step; see `Carried`.
    """

    config: DecoderConfig
    compute: Compute
    reference: Params = None
    carried: Any = None

    def completion_states(self, params: Params, sequences: Any) -> Float[Array, "B C D"]:
        """Final hidden states at the positions that predict each completion token."""
        hidden = hidden_states(
            self.config, self.compute, params, sequences.tokens, _known(sequences)
        )
        return _at_completions(hidden, sequences, -1)

    def layer_states(self, params: Params, sequences: Any, layer: int) -> Float[Array, "B C D"]:
        """What a layer gives out at each completion token itself."""
        hidden = layer_states(
            self.config, self.compute, params, sequences.tokens, layer, _known(sequences)
        )
        return _at_completions(hidden, sequences, 0)

    def head(self, params: Params) -> Float[Array, "D V"]:
        """The output matrix."""
        return head_matrix(self.config, params)

    def completion_logps(self, params: Params, sequences: Any) -> Float[Array, "B C"]:
        """Log-probability of every completion token; entries past a row's length mean nothing.

        Only the positions that predict completion tokens reach the head.
        """
        return token_logps(
            self.completion_states(params, sequences),
            self.head(params),
            sequences.completions,
            self.compute.logits_chunk,
        )


def _known(sequences: Any) -> Int[Array, "B T"]:
    """Of a dynamic rope: a sampler computes the prompt at once, then a token at a time."""
    T = sequences.tokens.shape[1]
    return jnp.maximum(sequences.prompt_lengths[:, None], jnp.arange(1, T + 1))


def _at_completions(hidden: Array, sequences: Any, shift: int) -> Array:
    """[B, T, D] -> [B, C, D], at each completion token or at its neighbor."""
    at = sequences.prompt_lengths[:, None] + shift + jnp.arange(sequences.completions.shape[1])
    at = jnp.clip(at, 0, sequences.tokens.shape[1] - 1)
    return jnp.take_along_axis(hidden, at[:, :, None], axis=1)


class Carried(NamedTuple):
    """Numbers that an objective wants kept from step to step, such as a dual variable.

    Attributes:
      start: {name: number} before the first step.
      after: (carried, metrics of the step) -> carried; pure.
    """

    start: dict[str, float]
    after: Callable[[dict[str, Array], Metrics], dict[str, Array]]


# (policy, params, batch) -> (loss, metrics). Its loss is a mean over rows.
Objective = Callable[[Policy, Params, Batch], tuple[Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """An objective, an optimizer and a mesh, and the jitted functions made of them.

    Attributes:
      policy: the model.
      objective: what is minimized.
      optimizer: from optax.
      mesh: where everything lies.
      accumulation: micro-batches that a step's batch is cut into.
      ema_decay: decay of the exponential moving average of the parameters; None for none.
      part: what is trained beside a frozen model; None trains all parameters.
      seed: of the adapters' dropout.
      refers: whether the objective asks for `Policy.reference`.
      carried: what goes from step to step beside the parameters; None for nothing.
    """

    policy: Policy
    objective: Objective
    optimizer: optax.GradientTransformation
    mesh: Mesh
    accumulation: int = 1
    ema_decay: float | None = None
    part: Trainable = None
    seed: int = 0
    refers: bool = False
    carried: Carried | None = None

    def abstract_trained(self) -> Params:
        """Shapes of what is trained."""
        return abstract_trainable(self.policy.config, self.part)

    def abstract_state(self) -> State:
        """Shapes, dtypes and shardings of the state, without making it."""
        params = self.abstract_trained()
        shardings = param_shardings(params, self.mesh)
        everywhere = replicated(self.mesh)

        def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        opt_state = jax.eval_shape(self.optimizer.init, params)
        state = {
            "params": jax.tree.map(place, params, shardings),
            "opt_state": optax.tree_map_params(
                self.optimizer,
                place,
                opt_state,
                shardings,
                transform_non_params=lambda x: place(x, everywhere),
            ),
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        }
        if self.ema_decay is not None:
            state["ema"] = state["params"]
        if self.carried is not None:
            number = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
            state["carried"] = dict.fromkeys(self.carried.start, number)
        return state

    def init(self, params: Params, ema: Params = None) -> State:
        """A fresh state around parameters. They are copied: the update step donates its state.

        Args:
          params: where to start.
          ema: where their moving average starts, if one is kept; `params` by default.
        """
        return self._make_state(params, params if ema is None else ema)

    @cached_property
    def _make_state(self) -> Callable[[Params, Params], State]:
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())

        def make(params: Params, ema: Params) -> State:
            params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
            state = {
                "params": jax.tree.map(jnp.copy, params),
                "opt_state": self.optimizer.init(params),
                "step": jnp.zeros((), jnp.int32),
            }
            if self.ema_decay is not None:
                state["ema"] = jax.tree.map(lambda x: jnp.copy(x.astype(jnp.float32)), ema)
            if self.carried is not None:
                start = self.carried.start.items()
                state["carried"] = {k: jnp.asarray(v, jnp.float32) for k, v in start}
            return state

        return jax.jit(make, out_shardings=shardings)

    def put(self, batch: Batch) -> Batch:
        """Places a batch of numpy arrays on the mesh, rows over data and fsdp."""
        return jax.device_put(batch, batch_sharding(self.mesh))

    def make_update(self) -> Callable[[State, Params, Batch], tuple[State, Metrics]]:
        """The jitted update. State goes in donated and comes out with the same shardings."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        beside = self.part is not None or self.refers
        frozen = param_shardings(abstract_params(self.policy.config), self.mesh) if beside else {}
        return jax.jit(
            self.update,
            donate_argnums=0,
            in_shardings=(shardings, frozen, batch_sharding(self.mesh)),
            out_shardings=(shardings, replicated(self.mesh)),
        )

    def update(self, state: State, frozen: Params, batch: Batch) -> tuple[State, Metrics]:
        """One optimizer step on one batch; pure.

        Args:
          state: what is trained, and the optimizer's.
          frozen: the model that what is trained stands beside, which is also the reference; {}
            where all parameters are trained and no reference is asked for.
          batch: what the objective takes.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), state["step"])
        reference = jax.lax.stop_gradient(frozen)
        policy = dataclasses.replace(self.policy, reference=reference, carried=state.get("carried"))
        gradients, metrics = self._gradients(policy, state["params"], frozen, batch, key)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.optimizer.update(
                gradients, state["opt_state"], state["params"]
            )
            params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        if self.ema_decay is not None:
            new["ema"] = optax.incremental_update(params, state["ema"], 1.0 - self.ema_decay)
        if self.carried is not None:
            new["carried"] = self.carried.after(state["carried"], metrics)
        return new, metrics | {"grad_norm": optax.global_norm(gradients)}

    def _gradients(
        self, policy: Policy, trained: Params, frozen: Params, batch: Batch, key: Array
    ) -> tuple[Params, Metrics]:
        """Mean gradient and metrics over the micro-batches."""

        def loss_fn(trained: Params, batch: Batch) -> tuple[Array, Metrics]:
            params = assemble(self.part, frozen, trained, key)
            loss, metrics = self.objective(policy, params, batch)
            return loss, metrics | {"loss": loss}

        grad = jax.grad(loss_fn, has_aux=True)
        if self.accumulation == 1:
            return grad(trained, batch)

        n = self.accumulation
        # Row i goes to micro-batch i % n, so that every micro-batch spans all of the mesh's rows.
        micro = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1), batch
        )

        def body(total: Any, rows: Batch) -> tuple[Any, None]:
            return jax.tree.map(lambda a, b: a + b / n, total, grad(trained, rows)), None

        first = jax.tree.map(lambda x: x[0], micro)
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, trained, first)
        )
        return jax.lax.scan(body, zero, micro)[0]
