"""Rotary position embeddings, in the half-rotation layout that Hugging Face checkpoints use.

A `Rope` describes the wavelengths, `rotation` turns positions into cosines and sines once for all
layers that share them, `rotate` applies them. The scalings are those of transformers, so that a
model computes the same function here and there.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from cipo_jax.typing import Array, Float, Int

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Wavelengths of a rotary embedding, and their scaling to longer contexts.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: default (Su et al. 2021, arXiv 2104.09864); linear (position interpolation, Chen et al.
        2023, arXiv 2306.15595); dynamic (NTK-aware, by the current length); llama3 (Llama 3.1);
        yarn (Peng et al. 2023, arXiv 2309.00071).
      factor: ratio of the longer context to the trained one.
      trained_positions: length of the trained context; dynamic, llama3 and yarn need it.
      low_freq_factor: llama3: wavelengths above trained_positions / this are scaled in full.
      high_freq_factor: llama3: wavelengths below trained_positions / this are unchanged.
      beta_fast: yarn: dimensions with more rotations per trained context are unchanged.
      beta_slow: yarn: dimensions with fewer rotations per trained context are scaled in full.
      truncate: yarn: whether the range between the two is rounded outward to whole dimensions.
      scale: yarn: factor on cosines and sines, and so, squared, on the attention logits.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    trained_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    scale: float = 1.0


class Rotation(NamedTuple):
    """Cosines and sines of tokens' angles, float32."""

    cos: Float[Array, "*B T H2"]
    sin: Float[Array, "*B T H2"]


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dimensions, [H/2] float32; unscaled for "dynamic".

    Args:
      rope: the embedding.
      head_dim: H, even.
    """
    half = head_dim // 2
    # Powers of a float32 series, not of a float64 one, since transformers computes them so.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / (np.float32(rope.theta) ** exponents)).astype(np.float32)
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / plain
        low = rope.trained_positions / rope.low_freq_factor
        high = rope.trained_positions / rope.high_freq_factor
        between = (rope.trained_positions / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        share = np.where(wavelengths < high, 1.0, np.where(wavelengths > low, 0.0, between))
        return ((1 - share) * plain / rope.factor + share * plain).astype(np.float32)
    if rope.kind == "yarn":

        def dimension(turns: float) -> float:
            """The dimension with this number of rotations in the trained context."""
            context = rope.trained_positions / (turns * 2 * math.pi)
            return head_dim * math.log(context) / (2 * math.log(rope.theta))

        low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        scaled = np.clip((np.arange(half) - low) / (high - low), 0.0, 1.0)
        return (plain / rope.factor * scaled + plain * (1 - scaled)).astype(np.float32)
    return plain


def rotation(
    rope: Rope | None,
    head_dim: int,
    positions: Int[Array, "*B T"],
    seq_len_at_token: Int[Array, "*B T"] | None = None,
) -> Rotation:
    """Cosines and sines of tokens at given positions.

    Args:
      rope: the embedding; None for layers without one, which are not rotated at all.
      head_dim: H, even.
      positions: absolute position of each token.
      seq_len_at_token: tokens that the sequence had when each token was computed, which sets the
        scaling of a dynamic embedding; by default the greatest position + 1 of each row.

    Returns:
      Float32 cosines and sines, one per token and pair of dimensions.
    """
    half = head_dim // 2
    if rope is None:
        shape = (*positions.shape, half)
        return Rotation(jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
    if rope.kind == "dynamic":
        if seq_len_at_token is None:
            seq_len_at_token = jnp.max(positions, axis=-1, keepdims=True) + 1
        length = jnp.maximum(seq_len_at_token, rope.trained_positions).astype(jnp.float32)
        scaling = rope.factor * length / rope.trained_positions - (rope.factor - 1)
        # theta' = theta * scaling^(H / (H - 2)), so each frequency is divided by a power of it.
        exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / (head_dim - 2)
        turn = frequencies(rope, head_dim) * scaling[..., None] ** -exponents
    else:
        turn = jnp.asarray(frequencies(rope, head_dim))
    angles = positions[..., None].astype(jnp.float32) * turn
    return Rotation(jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale)


def rotate(x: Float[Array, "*B T heads H"], by: Rotation) -> Float[Array, "*B T heads H"]:
    """Rotates queries or keys; computed in float32, returned in the dtype of x."""
    cos, sin = by.cos[..., None, :], by.sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
