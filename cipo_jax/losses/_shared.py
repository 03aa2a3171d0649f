"""Helpers that the losses share."""

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


def wide(x: jax.Array) -> jax.Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def token_count(
    mask: jax.Array, num_tokens: jax.Array | None, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """The divisor of a mean over tokens: `num_tokens`, or the tokens of the mask, at least 1."""
    count = jnp.maximum(jnp.sum(mask), 1) if num_tokens is None else jnp.asarray(num_tokens)
    return count.astype(dtype)


def token_mean(
    values: jax.Array, mask: jax.Array, num_tokens: jax.Array | None = None
) -> jax.Array:
    """Mean of values over the tokens that count; 0 where there are none.

    Args:
      values: [B, C], one value per token.
      mask: [B, C], true where a token counts.
      num_tokens: [] divisor of the sum; None for the tokens of the mask. Of a micro-batch, it is
        the tokens of the whole batch divided by the number of micro-batches, so that the mean over
        micro-batches equals that of the whole batch.
    """
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return total / token_count(mask, num_tokens, total.dtype)
