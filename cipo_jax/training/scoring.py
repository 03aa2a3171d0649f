"""Token log-probabilities of given completions, in fixed-shape batches and without gradients."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cipo_jax import losses
from cipo_jax.data.batches import Shape, TokenizedExample, bucket, collate, fixed_batches
from cipo_jax.training.mesh import batch_sharding, replicated
from cipo_jax.training.step import Policy
from cipo_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores completions under a model.

    Attributes:
      policy: the model.
      mesh: where it lies.
      rows: completions scored at a time.
    """

    policy: Policy
    mesh: Mesh
    rows: int = 64

    @cached_property
    def _logps(self) -> Any:
        return jax.jit(
            self.policy.completion_logps,
            in_shardings=(None, batch_sharding(self.mesh)),  # The parameters stay where they are.
            out_shardings=replicated(self.mesh),
        )

    @cached_property
    def _divergences(self) -> Any:
        def both(params: Params, other: Params, sequences: Any) -> Any:
            models = [
                (self.policy.completion_states(p, sequences), self.policy.head(p))
                for p in (params, other)
            ]
            chunk = self.policy.compute.logits_chunk
            return losses.over_chunks(losses.kl_per_token, models, chunk=chunk)

        return jax.jit(
            both,
            in_shardings=(None, None, batch_sharding(self.mesh)),
            out_shardings=replicated(self.mesh),
        )

    def divergences(
        self, params: Params, other: Params, rows: Sequence[TokenizedExample], shape: Shape
    ) -> list[np.ndarray]:
        """KL(other || params) of the next-token distributions at each token, in nats.

        Args:
          params: as in `token_logps`.
          other: another model of the same shape.
          rows: prompts and completions.
          shape: as in `token_logps`.
        """
        return self._by_row(functools.partial(self._divergences, params, other), rows, shape)

    def token_logps(
        self, params: Params, rows: Sequence[TokenizedExample], shape: Shape
    ) -> list[np.ndarray]:
        """Log-probability of each token of each completion, in nats.

        Args:
          params: training layout, or with adapters; see `models.decoder.hidden_states`.
          rows: prompts and completions.
          shape: padded sizes; one shape for all calls means one compilation.
        """
        return self._by_row(functools.partial(self._logps, params), rows, shape)

    def _by_row(
        self, function: Callable[[Any], Any], rows: Sequence[TokenizedExample], shape: Shape
    ) -> list[np.ndarray]:
        """[C] values of each completion's own tokens, computed in batches of one size."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        found: list[np.ndarray] = []
        for batch, count in fixed_batches(rows, bucket(self.rows, shards)):
            values = np.asarray(function(collate(batch, shape)))
            found += [values[i, : len(batch[i].completion)] for i in range(count)]
        return found
