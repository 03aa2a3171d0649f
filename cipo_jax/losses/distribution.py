"""Losses on whole next-token distributions, and a way to have them without [B, C, V].

Each comes in two layers. The ``*_per_token`` functions take logits [..., V] and give [...]; the
losses of the same names take the mean over the tokens that a mask counts, and logits of the others
may be anything. Of a micro-batch, their `num_tokens` is the number of tokens of the whole batch
divided by the number of micro-batches. All are computed in float32 at least. For a model whose
logits would not fit, `over_chunks` applies a per-token function to hidden states and the head, a
chunk of tokens at a time, forwards and backwards:

    values = over_chunks(kl_per_token, [(hidden, head), (ref_hidden, ref_head)], chunk=1024)
    loss = token_mean(values, mask)

Every sum over V is a plain reduction, so V may be sharded.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cipo_jax.losses._shared import Metrics, token_mean, wide


def _is(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """[..., V], true at the targets; no gather, so that V may be sharded."""
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return vocabulary == targets[..., None]


def _counted(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Zeros where a token does not count, before anything is computed from it.

    A NaN there would otherwise come back in the gradient, as 0 times NaN.
    """
    return jnp.where(mask[..., None], wide(x), 0.0)


def _cross_entropy(target_logits: jax.Array, logits: jax.Array) -> jax.Array:
    """``-sum_v softmax(target)_v log softmax(logits)_v``; the target gets no gradient."""
    target_logits, logits = wide(target_logits), wide(logits)
    target = jax.nn.softmax(jax.lax.stop_gradient(target_logits), axis=-1)
    # Where the target has no mass, log-probabilities of minus infinity do not matter.
    return -jnp.sum(jnp.where(target > 0, target * jax.nn.log_softmax(logits, axis=-1), 0.0), -1)


def kl_per_token(logits: jax.Array, ref_logits: jax.Array) -> jax.Array:
    """``KL(p_ref || p)`` of each position: [..., V], [..., V] -> [...], in nats."""
    ref = jax.nn.log_softmax(wide(jax.lax.stop_gradient(ref_logits)), axis=-1)
    difference = ref - jax.nn.log_softmax(wide(logits), axis=-1)
    return jnp.sum(jnp.where(ref > -jnp.inf, jnp.exp(ref) * difference, 0.0), axis=-1)


def kd_per_token(
    logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """``T^2 KL(p_teacher^(1/T) || p^(1/T))`` of each position (Hinton et al. 2015)."""
    return temperature**2 * kl_per_token(logits / temperature, teacher_logits / temperature)


def ceu_per_token(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy to the model's own distribution without the target token (CE-U, 2503.01224).

    ``-sum_v q_v log p_v`` with ``q = sg softmax(z, z_y = -inf)``: [..., V], [...] -> [...].
    """
    without = jnp.where(_is(targets, logits), -jnp.inf, logits)
    return _cross_entropy(without, logits)


def undial_per_token(
    logits: jax.Array, ref_logits: jax.Array, targets: jax.Array, beta: float = 10.0
) -> jax.Array:
    """Cross entropy to the reference with the target token's logit lowered (UNDIAL, 2402.10052).

    ``-sum_v q_v log p_v`` with ``q = softmax(z_ref - b onehot(y))``.
    """
    lowered = ref_logits - beta * _is(targets, ref_logits)
    return _cross_entropy(lowered, logits)


def flatness_per_token(logits: jax.Array) -> jax.Array:
    """``(max_v z_v - mean_v z_v)^2`` of each position: PDU's forget loss (arXiv 2506.05314)."""
    logits = wide(logits)
    return jnp.square(jnp.max(logits, axis=-1) - jnp.mean(logits, axis=-1))


def kl(
    logits: jax.Array,
    ref_logits: jax.Array,
    mask: jax.Array,
    *,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Mean KL(p_ref || p) over the tokens that count: keeps what is retained as it was.

    Args:
      logits: [B, C, V] of the policy, at the positions that predict each token.
      ref_logits: [B, C, V] of the reference; gets no gradient.
      mask: [B, C], true where a token counts. Padding is no part of the mean.
      num_tokens: [] divisor of the mean; None for the tokens of the mask.

    Returns:
      The loss in nats a token, and {"kl"}.
    """
    loss = token_mean(
        kl_per_token(_counted(logits, mask), _counted(ref_logits, mask)), mask, num_tokens
    )
    return loss, {"kl": loss}


def kd(
    logits: jax.Array,
    teacher_logits: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Knowledge distillation from a teacher's distributions (Hinton et al. 2015, arXiv 1503.02531).

    Args:
      logits: [B, C, V] of the student.
      teacher_logits: [B, C, V] of the teacher; gets no gradient.
      mask: [B, C], true where a token counts.
      temperature: T, of both distributions; the loss is scaled by T^2.
      num_tokens: [] divisor of the mean; None for the tokens of the mask.

    Returns:
      The loss, and {"kd"}.
    """
    logits, teacher_logits = _counted(logits, mask), _counted(teacher_logits, mask)
    loss = token_mean(kd_per_token(logits, teacher_logits, temperature), mask, num_tokens)
    return loss, {"kd": loss}


def ceu(
    logits: jax.Array, targets: jax.Array, mask: jax.Array, *, num_tokens: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """CE-U (Yang 2025, arXiv 2503.01224): see `ceu_per_token`.

    Args:
      logits: [B, C, V] of the policy.
      targets: [B, C] ids to forget.
      mask: [B, C], true where a token counts.
      num_tokens: [] divisor of the mean; None for the tokens of the mask.

    Returns:
      The loss, and {"forget/ceu"}.
    """
    loss = token_mean(ceu_per_token(_counted(logits, mask), targets), mask, num_tokens)
    return loss, {"forget/ceu": loss}


def undial(
    logits: jax.Array,
    ref_logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    beta: float = 10.0,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """UNDIAL (Dong et al. 2024, arXiv 2402.10052): see `undial_per_token`.

    Args:
      logits: [B, C, V] of the policy.
      ref_logits: [B, C, V] of the frozen model; gets no gradient.
      targets: [B, C] ids to forget.
      mask: [B, C], true where a token counts. Padding is no part of the mean.
      beta: how far the target token's logit is lowered.
      num_tokens: [] divisor of the mean; None for the tokens of the mask.

    Returns:
      The loss, and {"forget/undial"}.
    """
    logits, ref_logits = _counted(logits, mask), _counted(ref_logits, mask)
    loss = token_mean(undial_per_token(logits, ref_logits, targets, beta), mask, num_tokens)
    return loss, {"forget/undial": loss}


def flatness(
    logits: jax.Array, mask: jax.Array, *, num_tokens: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """PDU's forget loss: logits are made flat (arXiv 2506.05314); see also `dual_ascent`.

    Args:
      logits: [B, C, V] of the policy.
      mask: [B, C], true where a token counts.
      num_tokens: [] divisor of the mean; None for the tokens of the mask.

    Returns:
      The loss, and {"forget/flatness"}.
    """
    loss = token_mean(flatness_per_token(_counted(logits, mask)), mask, num_tokens)
    return loss, {"forget/flatness": loss}


def over_chunks(
    function: Callable[..., jax.Array],
    states_and_heads: Sequence[tuple[jax.Array, jax.Array]],
    *per_token: jax.Array,
    chunk: int = 1024,
) -> jax.Array:
    """function(logits of each model, ...) at every position, a chunk of tokens at a time.

    A checkpointed scan makes the logits of one chunk, forwards and again backwards; the largest
    array is [chunk, V] for each model. Logits, and the heads' gradients, are in float32.

    Args:
      function: of [n, V] logits for each model and [n] arrays, giving [n].
      states_and_heads: for each model its hidden states [B, C, D] and its head [D, V].
      *per_token: [B, C] arrays that go with the tokens, such as targets.
      chunk: tokens at a time.

    Returns:
      [B, C] values.
    """
    B, C, _ = states_and_heads[0][0].shape
    tokens = B * C
    chunk = min(chunk, tokens)
    chunks = -(-tokens // chunk)

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, ((0, chunks * chunk - tokens), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(chunks, chunk, *x.shape[1:])

    at_least_f32 = jnp.promote_types(states_and_heads[0][0].dtype, jnp.float32)
    heads = [head.astype(at_least_f32) for _, head in states_and_heads]

    @jax.checkpoint
    def body(_: None, part: tuple[list[jax.Array], list[jax.Array]]) -> tuple[None, jax.Array]:
        states, others = part
        logits = [
            jnp.dot(h, head.astype(h.dtype), preferred_element_type=at_least_f32)
            for h, head in zip(states, heads, strict=True)
        ]
        return None, function(*logits, *others)

    states = [cut(state) for state, _ in states_and_heads]
    _, values = jax.lax.scan(body, None, (states, [cut(x) for x in per_token]))
    return values.reshape(chunks * chunk)[:tokens].reshape(B, C)
