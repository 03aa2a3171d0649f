"""The policy: the model's functions that losses are made of."""

import dataclasses

import jax.numpy as jnp

from cipo_jax.data.batches import CompletionBatch
from cipo_jax.models.decoder import (
    Compute,
    DecoderConfig,
    head_matrix,
    hidden_states,
    layer_states,
)
from cipo_jax.ops.token_logps import token_logps
from cipo_jax.typing import Array, Float, Int, Params


@dataclasses.dataclass(frozen=True)
class Policy:
    """The functions of a model that objectives are made of. Static where it has no dropout key.

    Attributes:
      config: shape of the model.
      compute: dtype and kernels.
      dropout_key: of the adapters' dropout in this step; None for no dropout.
    """

    config: DecoderConfig
    compute: Compute
    dropout_key: Array | None = None

    def completion_states(
        self, params: Params, sequences: CompletionBatch
    ) -> Float[Array, "B C D"]:
        """Final hidden states at the positions that predict each completion token."""
        hidden = hidden_states(
            self.config,
            self.compute,
            params,
            sequences.tokens,
            seq_len_at_token=_seq_len_at_token(sequences),
            dropout_key=self.dropout_key,
        )
        return _at_completions(hidden, sequences, -1)

    def layer_states(
        self, params: Params, sequences: CompletionBatch, layer: int
    ) -> Float[Array, "B C D"]:
        """Output of a layer at each completion token itself."""
        hidden = layer_states(
            self.config,
            self.compute,
            params,
            sequences.tokens,
            layer,
            seq_len_at_token=_seq_len_at_token(sequences),
            dropout_key=self.dropout_key,
        )
        return _at_completions(hidden, sequences, 0)

    def head(self, params: Params) -> Float[Array, "D V"]:
        """The output matrix."""
        return head_matrix(self.config, params)

    def completion_logps(self, params: Params, sequences: CompletionBatch) -> Float[Array, "B C"]:
        """Log-probability of every completion token; entries past a row's length mean nothing.

        Only the positions that predict completion tokens reach the head.
        """
        return token_logps(
            self.completion_states(params, sequences),
            self.head(params),
            sequences.completions,
            self.compute.logits_chunk,
        )


def _seq_len_at_token(sequences: CompletionBatch) -> Int[Array, "B T"]:
    """For a dynamic rope: a sampler computes the prompt at once, then a token at a time."""
    T = sequences.tokens.shape[1]
    return jnp.maximum(sequences.prompt_lengths[:, None], jnp.arange(1, T + 1))


def _at_completions(hidden: Array, sequences: CompletionBatch, shift: int) -> Array:
    """[B, T, D] -> [B, C, D], at each completion token shifted by `shift` positions."""
    at = sequences.prompt_lengths[:, None] + shift + jnp.arange(sequences.completions.shape[1])
    at = jnp.clip(at, 0, sequences.tokens.shape[1] - 1)
    return jnp.take_along_axis(hidden, at[:, :, None], axis=1)
