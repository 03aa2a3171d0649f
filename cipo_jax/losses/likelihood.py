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
    *,
    num_tokens: jax.Array | None = None,
    num_sequences: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Negative log-likelihood of completions, in nats per token.

    ``-mean_b( sum_c m log p / sum_c m )`` for "sequence", ``-sum m log p / sum m`` for "token".
    With "sequence" every completion weighs the same; "token" is what TRL's SFT computes.

    Args:
      token_logps: [B, C] log-probabilities of the completion tokens, in nats.
      mask: [B, C], true where a token counts. Rows without any do not count at all.
      average: over completions of their means over tokens, or over all tokens.
      num_tokens: [] divisor with "token"; None for the tokens of the mask. Of a micro-batch, it is
        the count of the whole batch divided by the number of micro-batches.
      num_sequences: [] the same with "sequence", of the rows that have tokens.

    Returns:
      The loss, and {"nll": loss}.
    """
    sums = sequence_logps(token_logps, mask)
    counts = jnp.sum(mask, axis=-1).astype(sums.dtype)
    if average == "token":
        total, count, given = jnp.sum(sums), jnp.sum(counts), num_tokens
    else:
        total = jnp.sum(sums / jnp.maximum(counts, 1.0))
        count, given = jnp.sum(counts > 0).astype(sums.dtype), num_sequences
    divisor = jnp.maximum(count, 1.0) if given is None else jnp.asarray(given, sums.dtype)
    loss = -total / divisor
    return loss, {"nll": loss}
