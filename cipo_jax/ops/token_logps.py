"""Log-probabilities of given tokens, without [B, T, V] ever existing."""

import jax
import jax.numpy as jnp

from cipo_jax.typing import Array, Float, Int


def token_logps(
    hidden: Float[Array, "B C D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B C"],
    chunk: int = 1024,
) -> Float[Array, "B C"]:
    """Log-probability of each target under softmax(hidden @ head), in float32.

    The tokens are cut into chunks; a checkpointed scan makes the logits of one chunk at a time, in
    the forward pass and again in the backward pass, so that the largest array is [chunk, V]. The
    target's logit is a masked sum rather than a gather, which stays local when V is sharded.

    Args:
      hidden: final hidden states (after the last norm), at the positions that predict `targets`.
      head: output matrix.
      targets: token ids.
      chunk: tokens per chunk.

    Returns:
      Log-probabilities in nats.
    """
    B, C, D = hidden.shape
    tokens = B * C
    chunk = min(chunk, tokens)
    chunks = -(-tokens // chunk)
    pad = chunks * chunk - tokens
    flat_hidden = jnp.pad(hidden.reshape(tokens, D), ((0, pad), (0, 0)))
    flat_targets = jnp.pad(targets.reshape(tokens), (0, pad))

    # The head enters the scan in f32, so that its gradient accumulates over the chunks in f32 even
    # where the products themselves run in a narrower dtype.
    head_f32 = head.astype(jnp.float32)

    @jax.checkpoint
    def body(_, xs):
        h, y = xs
        with jax.named_scope("token_logps"):
            logits = jnp.dot(
                h, head_f32.astype(h.dtype), preferred_element_type=jnp.float32
            ).astype(jnp.float32)
            vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            target = jnp.sum(jnp.where(vocabulary == y[:, None], logits, 0.0), axis=-1)
            return None, target - jax.nn.logsumexp(logits, axis=-1)

    xs = (flat_hidden.reshape(chunks, chunk, D), flat_targets.reshape(chunks, chunk))
    _, logps = jax.lax.scan(body, None, xs)
    return logps.reshape(chunks * chunk)[:tokens].reshape(B, C)
