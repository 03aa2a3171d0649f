"""Token log-probabilities of given completions, in fixed-shape batches and without gradients."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cipo_jax.data.batches import Encoded, Shape, bucket, collate, fixed_batches
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

    def token_logps(
        self, params: Params, rows: Sequence[Encoded], shape: Shape
    ) -> list[np.ndarray]:
        """Log-probability of each token of each completion, in nats.

        Args:
          params: training layout, or with adapters; see `models.decoder.hidden_states`.
          rows: prompts and completions.
          shape: padded sizes; one shape for all calls means one compilation.
        """
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        scored: list[np.ndarray] = []
        for batch, count in fixed_batches(rows, bucket(self.rows, shards)):
            logps = np.asarray(self._logps(params, collate(batch, shape)))
            scored += [logps[i, : len(batch[i].completion)] for i in range(count)]
        return scored
