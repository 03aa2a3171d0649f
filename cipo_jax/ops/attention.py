"""Attention as pure functions: one for whole sequences, one for a decoding step.

Sequences are right-padded, so causality alone keeps real tokens from ever seeing padding: whole
sequences need no mask beyond the causal one, and none is ever made from ``ids != pad_id``.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from cipo_jax.typing import Array, Float, Int

Implementation = Literal["xla", "cudnn"]


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
      window: tokens that a query sees at most, itself included; None for all up to it.

    Returns:
      The attended values. Rows beyond a sequence's length hold numbers that mean nothing.
    """
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def decode_attention(
    q: Float[Array, "P n N H"],
    prompt_k: Float[Array, "P K S H"],
    prompt_v: Float[Array, "P K S H"],
    prompt_lengths: Int[Array, " P"],
    k: Float[Array, "P n K R H"],
    v: Float[Array, "P n K R H"],
    slot: Int[Array, ""],
    window: int | None = None,
) -> Float[Array, "P n N H"]:
    """One decoding step: n samples of a prompt attend to its shared cache and to their own.

    A single softmax spans both caches, so the result equals attention over their concatenation
    without ever repeating the prompt's keys n times.

    Args:
      q: this step's queries.
      prompt_k: keys of the right-padded prompts, read-only.
      prompt_v: values of the prompts.
      prompt_lengths: real tokens of each prompt.
      k: keys of the responses; slots 0..slot hold real tokens.
      v: values of the responses.
      slot: the response slot that this step has just written.
      window: tokens that a query sees at most, itself included; None for all up to it.

    Returns:
      The attended values.
    """
    P, n, N, H = q.shape
    K, S, R = prompt_k.shape[1], prompt_k.shape[2], k.shape[3]
    grouped = q.reshape(P, n, K, N // K, H) * (H**-0.5)
    on_prompt = jnp.einsum("PnKGH,PKSH->PnKGS", grouped, prompt_k)
    on_response = jnp.einsum("PnKGH,PnKRH->PnKGR", grouped, k)
    visible_prompt = jnp.arange(S)[None, :] < prompt_lengths[:, None]
    visible_response = jnp.arange(R) <= slot
    if window is not None:
        # The query stands at prompt_lengths + slot, response slot r at prompt_lengths + r.
        oldest = prompt_lengths[:, None] + slot - window + 1
        visible_prompt &= jnp.arange(S)[None, :] >= oldest
        visible_response &= jnp.arange(R) > slot - window
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.concatenate(
        [
            jnp.where(
                visible_prompt[:, None, None, None, :], on_prompt.astype(jnp.float32), lowest
            ),
            jnp.where(visible_response, on_response.astype(jnp.float32), lowest),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("PnKGS,PKSH->PnKGH", weights[..., :S], prompt_v)
    out = out + jnp.einsum("PnKGR,PnKRH->PnKGH", weights[..., S:], v)
    return out.reshape(P, n, N, H)
