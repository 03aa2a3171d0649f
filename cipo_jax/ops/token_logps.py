"""Log-probabilities of given tokens, without an array [B, T, V]."""

import jax
import jax.numpy as jnp

from cipo_jax.typing import Array, Float, Int

# Hidden states, head, targets and normalizers, for the backward pass.
_Kept = tuple[Array, Array, Array, Array]


def token_logps(
    hidden: Float[Array, "B C D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B C"],
    chunk: int = 1024,
) -> Float[Array, "B C"]:
    """Log-probability of each target under softmax(hidden @ head), in float32.

    The tokens are divided into chunks of equal size. A scan computes the logits of one chunk at a
    time, in the forward pass and again in the backward pass, so that the largest array is
    [chunk, V]. The target's logit is a masked sum instead of a gather, which stays local when V is
    sharded. The derivative is written out, for reverse mode only.

    Args:
      hidden: final hidden states (after the last norm), at the positions that predict `targets`.
      head: output matrix.
      targets: token ids.
      chunk: most tokens per chunk.

    Returns:
      Log-probabilities in nats.
    """
    B, C, D = hidden.shape
    tokens = B * C
    chunks = -(-tokens // chunk)
    chunk = -(-tokens // chunks)
    pad = chunks * chunk - tokens
    flat_hidden = jnp.pad(hidden.reshape(tokens, D), ((0, pad), (0, 0)))
    flat_targets = jnp.pad(targets.reshape(tokens), (0, pad))
    # The head is an f32 argument, so that its gradient accumulates over the chunks in f32 even if
    # the products run in a narrower dtype.
    logps = _chunked(
        flat_hidden.reshape(chunks, chunk, D),
        head.astype(jnp.float32),
        flat_targets.reshape(chunks, chunk),
    )
    return logps.reshape(chunks * chunk)[:tokens].reshape(B, C)


def _logits(h: Array, head: Array) -> Array:
    return jnp.dot(h, head.astype(h.dtype), preferred_element_type=jnp.float32)


def _is_target(y: Array, V: int) -> Array:
    """One-hot mask [n, V]. The barrier keeps XLA from hoisting the iota out of the loop."""
    y, vocabulary = jax.lax.optimization_barrier((y, jnp.arange(V, dtype=y.dtype)))
    return y[:, None] == vocabulary


@jax.custom_vjp
def _chunked(hidden: Array, head: Array, targets: Array) -> Array:
    return _forward(hidden, head, targets)[0]


def _forward(hidden: Array, head: Array, targets: Array) -> tuple[Array, _Kept]:
    def body(_: None, part: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        h, y = part
        with jax.named_scope("token_logps"):
            logits = _logits(h, head)
            target = jnp.sum(jnp.where(_is_target(y, head.shape[1]), logits, 0.0), axis=-1)
            total = jax.nn.logsumexp(logits, axis=-1)
            return None, (target - total, total)

    _, (logps, totals) = jax.lax.scan(body, None, (hidden, targets))
    return logps, (hidden, head, targets, totals)


def _backward(kept: _Kept, cotangents: Array) -> tuple[Array, Array, None]:
    hidden, head, targets, totals = kept

    def body(gradient: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        h, y, total, g = part
        with jax.named_scope("token_logps"):
            # The derivative of target - logsumexp: one-hot of the target minus softmax.
            softmax = jnp.exp(_logits(h, head) - total[:, None])
            d = g[:, None] * (_is_target(y, head.shape[1]).astype(jnp.float32) - softmax)
            d = d.astype(h.dtype)
            gradient += jnp.dot(h.T, d, preferred_element_type=jnp.float32)
            return gradient, jnp.dot(d, head.T.astype(h.dtype))

    parts = (hidden, targets, totals, cotangents)
    gradient, d_hidden = jax.lax.scan(body, jnp.zeros_like(head), parts)
    return d_hidden, gradient, None


_chunked.defvjp(_forward, _backward)
