"""Losses on activations: hidden states [B, T, D] of a chosen layer, beside a mask [B, T].

All are means of squared differences over the tokens that count and over D; padding is no part of
any mean, as it is in the authors' code. Of a micro-batch, `num_tokens` is the number of tokens of
the whole batch divided by the number of micro-batches; None counts the tokens of the mask.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cipo_jax.losses._shared import Metrics, token_count, wide


def _mean_square(difference: jax.Array, mask: jax.Array, num_tokens: jax.Array | None) -> jax.Array:
    squares = jnp.square(jnp.where(mask[..., None], wide(difference), 0.0))
    count = token_count(mask, num_tokens, squares.dtype)
    return jnp.sum(squares) / (count * difference.shape[-1])


def control_vector(key: jax.Array, size: int) -> jax.Array:
    """RMU's direction u: uniform in [0, 1), scaled to length 1; [size]."""
    u = jax.random.uniform(key, (size,))
    return u / jnp.linalg.norm(u)


def rmu_forget(
    hidden: jax.Array,
    mask: jax.Array,
    direction: jax.Array,
    *,
    scale: float = 6.5,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Representation misdirection (Li et al. 2024, arXiv 2403.03218, eq. 1).

    ``MSE(h, c u)``: activations on what is to be forgotten are driven to a fixed random vector.

    Args:
      hidden: [B, T, D] of the layer.
      mask: [B, T], true where a token counts.
      direction: [D] u, from `control_vector`.
      scale: c.
      num_tokens: [] divisor of the mean over tokens.

    Returns:
      The loss, and {"forget/mse"}.
    """
    loss = _mean_square(hidden - scale * jax.lax.stop_gradient(direction), mask, num_tokens)
    return loss, {"forget/mse": loss}


def hidden_match(
    hidden: jax.Array,
    ref_hidden: jax.Array,
    mask: jax.Array,
    *,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """``MSE(h, h0)``: activations on what is retained stay those of the frozen model.

    Args:
      hidden: [B, T, D] of the layer.
      ref_hidden: [B, T, D] of the frozen model; gets no gradient.
      mask: [B, T], true where a token counts.
      num_tokens: [] divisor of the mean over tokens.

    Returns:
      The loss, and {"retain/mse"}.
    """
    loss = _mean_square(hidden - jax.lax.stop_gradient(ref_hidden), mask, num_tokens)
    return loss, {"retain/mse": loss}


def r2mu(
    forget: tuple[jax.Array, jax.Array],
    retain: tuple[jax.Array, jax.Array, jax.Array],
    forget_traces: tuple[jax.Array, jax.Array],
    kept_traces: tuple[jax.Array, jax.Array, jax.Array],
    direction: jax.Array,
    *,
    scale: float = 6.5,
    retain_weight: float = 1.4,
    trace_weight: float = 1.0,
    reasoning_weight: float = 1.0,
    num_tokens: Sequence[jax.Array | None] = (None, None, None, None),
) -> tuple[jax.Array, Metrics]:
    """Reasoning-aware representation misdirection (R2MU, arXiv 2506.12963, eq. 6).

    ``MSE(h(x_f), c u) + a_r MSE(h(x_r), h0(x_r)) + a_u MSE(h(r_f), c u) + a_c MSE(h(r), h0(r))``:
    RMU, on traces of reasoning as well, and reasoning that is to be kept.

    Args:
      forget: hidden states [B, T, D] and mask [B, T] of the text to forget.
      retain: hidden states, those of the frozen model, and mask of text to keep.
      forget_traces: hidden states and mask of the model's own thoughts on what it is to forget.
      kept_traces: hidden states, those of the frozen model, and mask of reasoning to keep.
      direction: [D] u, from `control_vector`.
      scale: c.
      retain_weight: a_r.
      trace_weight: a_u.
      reasoning_weight: a_c.
      num_tokens: [] divisors of the means over tokens, in the order of the four groups.

    Returns:
      The loss, and {"forget/mse", "retain/mse", "forget_traces/mse", "kept_traces/mse"}.
    """
    a, b, c, d = num_tokens
    terms = {
        "forget/mse": rmu_forget(*forget, direction, scale=scale, num_tokens=a)[0],
        "retain/mse": hidden_match(*retain, num_tokens=b)[0],
        "forget_traces/mse": rmu_forget(*forget_traces, direction, scale=scale, num_tokens=c)[0],
        "kept_traces/mse": hidden_match(*kept_traces, num_tokens=d)[0],
    }
    weights = (1.0, retain_weight, trace_weight, reasoning_weight)
    loss = sum(w * term for w, term in zip(weights, terms.values(), strict=True))
    return jnp.asarray(loss), terms
