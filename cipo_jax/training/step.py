"""The update step: one jitted, donated, mesh-sharded pure function for every objective."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

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
)
from cipo_jax.models.lora import Lora, abstract_adapters, assemble
from cipo_jax.ops.token_logps import token_logps
from cipo_jax.training.mesh import batch_sharding, param_shardings, replicated
from cipo_jax.typing import Array, Float, Params

Metrics = dict[str, Array]
# {"params", "opt_state", "step"} and, where a reference wants it, "ema". "params" is what is
# trained: all parameters, or the adapters.
State = dict[str, Any]
Batch = dict[str, Any]  # Named groups of `data.batches.Sequences`, and per-row arrays.


@dataclasses.dataclass(frozen=True)
class Policy:
    """What an objective may ask of the model, as functions of (params, batch)."""

    config: DecoderConfig
    compute: Compute

    def completion_logps(self, params: Params, sequences: Any) -> Float[Array, "B C"]:
        """Log-probability of every completion token; entries past a row's length mean nothing.

        Only the positions that predict completion tokens reach the head.
        """
        # Of a dynamic rope: a sampler computes the prompt at once, then a token at a time.
        T = sequences.tokens.shape[1]
        known = jnp.maximum(sequences.starts[:, None], jnp.arange(1, T + 1))
        hidden = hidden_states(self.config, self.compute, params, sequences.tokens, known)
        C = sequences.completions.shape[1]
        at = sequences.starts[:, None] - 1 + jnp.arange(C)
        at = jnp.clip(at, 0, sequences.tokens.shape[1] - 1)
        hidden = jnp.take_along_axis(hidden, at[:, :, None], axis=1)
        return token_logps(
            hidden,
            head_matrix(self.config, params),
            sequences.completions,
            self.compute.logits_chunk,
        )


# (policy, params, batch) -> (loss, metrics). Its loss is a mean over rows.
Objective = Callable[[Policy, Params, Batch], tuple[Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """An objective, an optimizer and a mesh, and the jitted functions made of them.

    Attributes:
      policy: the model.
      objective: what is minimised.
      optimizer: from optax.
      mesh: where everything lies.
      accumulation: micro-batches that a step's batch is cut into.
      ema_decay: decay of the exponential moving average of the parameters; None for none.
      lora: the adapters that are trained beside a frozen base; None trains all parameters.
      seed: of the adapters' dropout.
    """

    policy: Policy
    objective: Objective
    optimizer: optax.GradientTransformation
    mesh: Mesh
    accumulation: int = 1
    ema_decay: float | None = None
    lora: Lora | None = None
    seed: int = 0

    def abstract_trained(self) -> Params:
        """Shapes of what is trained."""
        config = self.policy.config
        return abstract_adapters(config, self.lora) if self.lora else abstract_params(config)

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
            return state

        return jax.jit(make, out_shardings=shardings)

    def put(self, batch: Batch) -> Batch:
        """Places a batch of numpy arrays on the mesh, rows over data and fsdp."""
        return jax.device_put(batch, batch_sharding(self.mesh))

    def make_update(self) -> Callable[[State, Params, Batch], tuple[State, Metrics]]:
        """The jitted update. State goes in donated and comes out with the same shardings."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        frozen = (
            param_shardings(abstract_params(self.policy.config), self.mesh) if self.lora else {}
        )
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
          frozen: the base that adapters stand beside; {} where all parameters are trained.
          batch: what the objective takes.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), state["step"])
        gradients, metrics = self._gradients(state["params"], frozen, batch, key)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.optimizer.update(
                gradients, state["opt_state"], state["params"]
            )
            params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        if self.ema_decay is not None:
            new["ema"] = optax.incremental_update(params, state["ema"], 1.0 - self.ema_decay)
        return new, metrics | {"grad_norm": optax.global_norm(gradients)}

    def _gradients(
        self, trained: Params, frozen: Params, batch: Batch, key: Array
    ) -> tuple[Params, Metrics]:
        """Mean gradient and metrics over the micro-batches."""

        def loss_fn(trained: Params, batch: Batch) -> tuple[Array, Metrics]:
            params = assemble(self.lora, frozen, trained, key)
            loss, metrics = self.objective(self.policy, params, batch)
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
