"""Rotary position embeddings, in the half-rotation layout that Hugging Face checkpoints use."""

import jax.numpy as jnp

from cipo_jax.typing import Array, Float, Int


def rope(x: Float[Array, "*B T heads H"], positions: Int[Array, "*B T"], theta: float) -> Array:
    """Rotates queries or keys by their positions (Su et al. 2021, arXiv 2104.09864).

    Args:
      x: queries or keys; H is even.
      positions: absolute position of each token.
      theta: base of the geometric series of wavelengths.

    Returns:
      The rotated array, same shape and dtype as x; angles are computed in float32.
    """
    half = x.shape[-1] // 2
    inverse_wavelength = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * inverse_wavelength
    cos = jnp.cos(angles)[..., None, :]
    sin = jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
