"""What the losses have in common."""

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


def wide(x: jax.Array) -> jax.Array:
    """At least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def token_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of values [B, C] over the tokens that a mask [B, C] counts; 0 where there are none."""
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return total / jnp.maximum(jnp.sum(mask), 1).astype(total.dtype)
