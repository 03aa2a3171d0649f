"""Token log-probabilities of given completions, in fixed-shape batches and without gradients."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from cipo_jax import losses
from cipo_jax.data.batches import (
    CompletionBatch,
    PadShape,
    TokenizedExample,
    bucket,
    collate,
    fixed_batches,
)
from cipo_jax.training.mesh import batch_sharding, replicated
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores completions under a model. Equal scorers share compiled programs.

    Attributes:
      policy: the model.
      mesh: the devices.
      max_batch_size: completions scored at a time.
    """

    policy: Policy
    mesh: Mesh
    max_batch_size: int = 64

    def token_logps(
        self, params: Params, rows: Sequence[TokenizedExample], shape: PadShape
    ) -> list[np.ndarray]:
        """Log-probability of each token of each completion, in nats.

        Args:
          params: training layout, or with adapters; see `models.decoder.hidden_states`.
          rows: prompts and completions.
          shape: padded sizes; one shape for all calls means one compilation.
        """

        def score(batch: CompletionBatch) -> Array:
            return _logps(self.policy, self.mesh, params, batch)

        return self._by_row(score, rows, shape)

    def divergences(
        self, params: Params, other: Params, rows: Sequence[TokenizedExample], shape: PadShape
    ) -> list[np.ndarray]:
        """KL(other || params) of the next-token distributions at each token, in nats.

        Args:
          params: as in `token_logps`.
          other: another model of the same shape.
          rows: prompts and completions.
          shape: as in `token_logps`.
        """

        def score(batch: CompletionBatch) -> Array:
            return _divergences(self.policy, self.mesh, params, other, batch)

        return self._by_row(score, rows, shape)

    def _by_row(
        self,
        function: Callable[[CompletionBatch], Array],
        rows: Sequence[TokenizedExample],
        shape: PadShape,
    ) -> list[np.ndarray]:
        """[C] values of each completion's own tokens, computed in batches of one size."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        found: list[np.ndarray] = []
        for batch, count in fixed_batches(rows, bucket(self.max_batch_size, shards)):
            placed = jax.device_put(collate(batch, shape), batch_sharding(self.mesh))
            values = np.asarray(function(placed))
            found += [values[i, : len(batch[i].completion)] for i in range(count)]
        return found


def _replicate(mesh: Mesh, x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, replicated(mesh))


def _completion_logps(
    policy: Policy, mesh: Mesh, params: Params, sequences: CompletionBatch
) -> Array:
    return _replicate(mesh, policy.completion_logps(params, sequences))


def _completion_divergences(
    policy: Policy, mesh: Mesh, params: Params, other: Params, sequences: CompletionBatch
) -> Array:
    models = [(policy.completion_states(p, sequences), policy.head(p)) for p in (params, other)]
    chunk = policy.compute.logits_chunk
    return _replicate(mesh, losses.over_chunks(losses.kl_per_token, models, chunk=chunk))


_logps = jax.jit(_completion_logps, static_argnames=("policy", "mesh"))
_divergences = jax.jit(_completion_divergences, static_argnames=("policy", "mesh"))
