"""Likelihood terms: sums and means of token log-probabilities under an explicit mask."""

from typing import Literal

import jax
import jax.numpy as jnp

from cipo_jax.losses._shared import Metrics


def sequence_logps(token_logps: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums token log-probabilities over each completion.

    Args:
      token_logps: [B, C] log-probabilities of the completion tokens, in nats.
      mask: [B, C], true where a token is real. Masked entries may hold anything, NaN included.

    Returns:
      [B] log-probability of each completion.
    """
    return jnp.sum(jnp.where(mask, token_logps, 0.0), axis=-1)


def nll(
    token_logps: jax.Array,
    mask: jax.Array,
    average: Literal["sequence", "token"] = "sequence",
) -> tuple[jax.Array, Metrics]:
    """Negative log-likelihood of completions, in nats per token.

    ``-mean_b( sum_c m log p / sum_c m )`` for "sequence", ``-sum m log p / sum m`` for "token".
    With "sequence" every completion weighs the same, and so the mean over micro-batches equals the
    mean over the batch; "token" is what TRL's SFT computes.

    Args:
      token_logps: [B, C] log-probabilities of the completion tokens, in nats.
      mask: [B, C], true where a token counts. Rows without any do not count at all.
      average: what is averaged.

    Returns:
      The loss, and {"nll": loss}.
    """
    sums = sequence_logps(token_logps, mask)
    counts = jnp.sum(mask, axis=-1).astype(sums.dtype)
    if average == "token":
        loss = -jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1.0)
    else:
        rows = jnp.sum(counts > 0).astype(sums.dtype)
        loss = -jnp.sum(sums / jnp.maximum(counts, 1.0)) / jnp.maximum(rows, 1.0)
    return loss, {"nll": loss}
