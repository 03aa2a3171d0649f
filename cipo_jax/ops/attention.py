"""Attention as pure functions: one for whole sequences, one for a decoding step.

Rows are right-padded, so the causal mask alone keeps real tokens from attending to padding. No mask
is made from ``ids != pad_id``.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cipo_jax.typing import Array, Bool, Float

Implementation = Literal["xla", "cudnn"]
_BLOCK, _BLOCKS = 128, 8  # least queries per block, most blocks


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    implementation: Implementation = "xla",
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Causal grouped-query attention over right-padded sequences.

    Args:
      q: queries.
      k: keys, K divides N.
      v: values.
      implementation: "xla" runs anywhere, "cudnn" is flash attention on NVIDIA GPUs (16-bit only).
      window: tokens that a query attends to at most, itself included; None for no limit.

    Returns:
      The attended values; undefined beyond a sequence's length.
    """
    if implementation == "xla":
        return _attention(q, k, v, window)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def _attention(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Plain matrix products, one block of queries at a time with the keys that it attends to.

    Batch and heads lead, and the queries that share keys are adjacent: with any other layout XLA's
    CPU compiler copies the scores, in the backward pass several times. With n blocks only
    (n + 1) / 2n of all scores are computed.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)  # [B, K, G, T, H]
    k, v = jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)  # [B, K, H, T], [B, K, T, H]
    block = -(-T // min(max(T // _BLOCK, 1), _BLOCKS))
    attended = []
    for start in range(0, T, block):
        end = min(start + block, T)
        first = 0 if window is None else max(start + 1 - window, 0)
        queries, keys = jnp.arange(start, end)[:, None], jnp.arange(first, end)
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        rows = q[..., start:end, :].reshape(B, K, -1, H)
        scores = jnp.matmul(rows, k[..., first:end], preferred_element_type=jnp.float32)
        scores = scores.reshape(B, K, N // K, end - start, end - first) * H**-0.5
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        weights = weights.reshape(B, K, -1, end - first)
        attended.append(
            jnp.matmul(weights, v[..., first:end, :]).reshape(B, K, N // K, end - start, H)
        )
    return jnp.moveaxis(jnp.concatenate(attended, axis=3), 3, 1).reshape(B, T, N, H)


class KV(NamedTuple):
    """Keys and values of a cache, in full precision or as int8 with a scale for each vector.

    Keys are stored with their slots last, so that queries times keys is a plain matrix product; on
    a CPU that takes two thirds of the time.

    Attributes:
      k: [..., K, H, S] keys.
      v: [..., K, S, H] values.
      k_scale: [..., K, S] factors of int8 keys; None in full precision.
      v_scale: [..., K, S] factors of int8 values; None in full precision.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None


def quantized(kv: KV) -> KV:
    """Keys and values as int8, each vector scaled by its largest entry.

    The error of an entry is at most 1/254 of that; the cache takes a half to a quarter of the
    memory.
    """

    def one(x: Array, axis: int) -> tuple[Array, Array]:
        x = x.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axis, keepdims=True), 1e-30) / 127
        return jnp.round(x / scale).astype(jnp.int8), jnp.squeeze(scale, axis)

    (k, k_scale), (v, v_scale) = one(kv.k, -2), one(kv.v, -1)
    return KV(k, v, k_scale, v_scale)


def decode_attention(
    q: Float[Array, "P n N H"],
    prompt: KV,
    prompt_visible: Bool[Array, "P m S"],
    own: KV,
    own_visible: Bool[Array, "P n R"],
) -> Float[Array, "P n N H"]:
    """One decoding step: n samples of a prompt attend to its shared cache and to their own.

    A single softmax spans both caches, so the result equals attention over their concatenation
    without ever repeating the prompt's keys n times.

    Args:
      q: this step's queries.
      prompt: keys and values of the prompts, of leading axes P, K.
      prompt_visible: prompt slots that each query attends to; m is n, or 1 if all are alike.
      own: keys and values of the samples' own tokens, of leading axes P x n, K.
      own_visible: slots of their own tokens that the queries attend to.

    Returns:
      The attended values; undefined for a query that attends to nothing.
    """
    P, n, N, H = q.shape
    K, S = prompt.v.shape[1:3]
    R, G = own.v.shape[2], N // K
    # Both products are plain batched ones, [B, K, queries, H] times [B, K, H, slots]: with any
    # other form XLA's CPU compiler makes slow loops or copies of the cache.
    q = q * (H**-0.5)
    for_own = q.reshape(P * n, K, G, H)
    for_prompt = jnp.swapaxes(q.reshape(P, n, K, G, H), 1, 2).reshape(P, K, n * G, H)

    def scores(q: Array, kv: KV) -> Array:
        at = jnp.matmul(q, kv.k.astype(q.dtype), preferred_element_type=jnp.float32)
        return at if kv.k_scale is None else at * kv.k_scale[:, :, None]

    def values(weights: Array, kv: KV) -> Array:
        if kv.v_scale is not None:
            weights = weights * kv.v_scale[:, :, None]
        return jnp.matmul(weights.astype(q.dtype), kv.v.astype(q.dtype))

    lowest = jnp.finfo(jnp.float32).min
    on_prompt = jnp.swapaxes(scores(for_prompt, prompt).reshape(P, K, n, G, S), 1, 2)
    on_prompt = jnp.where(prompt_visible[:, :, None, None], on_prompt, lowest)
    on_own = scores(for_own, own).reshape(P, n, K, G, R)
    on_own = jnp.where(own_visible[:, :, None, None], on_own, lowest)
    weights = jax.nn.softmax(jnp.concatenate([on_prompt, on_own], axis=-1), axis=-1)
    to_prompt = jnp.swapaxes(weights[..., :S], 1, 2).reshape(P, K, n * G, S)
    from_prompt = jnp.swapaxes(values(to_prompt, prompt).reshape(P, K, n, G, H), 1, 2)
    from_own = values(weights[..., S:].reshape(P * n, K, G, R), own)
    return from_prompt.reshape(P, n, N, H) + from_own.reshape(P, n, N, H)
