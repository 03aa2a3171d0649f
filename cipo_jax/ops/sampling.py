"""Drawing the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty.

They are applied in the order of Hugging Face's ``generate``: penalty, temperature, top-k, top-p,
min-p.
"""

import functools

import jax
import jax.numpy as jnp

from cipo_jax.typing import Array, Bool, Float, Int

_BISECTIONS = 40
_LIKELY = 64
_BLOCK = 256  # tokens per block of `categorical`


def top_p_mask(logits: Float[Array, "*B V"], top_p: float) -> Bool[Array, "*B V"]:
    """The smallest set of most likely tokens whose probability reaches `top_p`, without a sort.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751); tokens that tie with the last one are
    kept. Bisection finds the greatest threshold at which the kept tokens sum to `top_p`; on a CPU
    only if the `_LIKELY` most likely tokens do not. A sort of V numbers takes several times as long
    on every backend.

    Args:
      logits: unnormalized log-probabilities.
      top_p: mass to keep, in (0, 1].

    Returns:
      True for tokens that may be drawn; always for the most likely one.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    threshold = jax.lax.platform_dependent(
        probs,
        cpu=functools.partial(_threshold_of_likely, top_p=top_p),
        default=functools.partial(_threshold, top_p=top_p),
    )
    return (probs >= threshold) | (probs == jnp.max(probs, axis=-1, keepdims=True))


def _threshold(probs: Float[Array, "*B V"], top_p: float) -> Float[Array, "*B 1"]:
    """A threshold between the nucleus and the next smaller probability, by bisection."""
    high = jnp.max(probs, axis=-1, keepdims=True)
    low = jnp.zeros_like(high)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        mass = jnp.sum(jnp.where(probs >= middle, probs, 0.0), axis=-1, keepdims=True)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    return jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))[0]


def _threshold_of_likely(probs: Float[Array, "*B V"], top_p: float) -> Float[Array, "*B 1"]:
    """The same from the most likely tokens if they reach `top_p`, as they mostly do.

    On a CPU 40 passes over the vocabulary take far longer than a top-k of 64. The threshold of a
    row depends on the row alone; the other rows only decide whether the bisection runs.
    """
    likely = jax.lax.top_k(probs, min(_LIKELY, probs.shape[-1]))[0]
    enough = jnp.cumsum(likely, axis=-1) >= top_p
    last = jnp.argmax(enough, axis=-1, keepdims=True)
    threshold, reached = jnp.take_along_axis(likely, last, axis=-1), enough[..., -1:]
    return jax.lax.cond(
        jnp.all(reached),
        lambda: threshold,
        lambda: jnp.where(reached, threshold, _threshold(probs, top_p)),
    )


def most_likely(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The index of the greatest entry, the first of equal ones.

    XLA's argmax over a vocabulary is a slow loop on a CPU. There a plain maximum finds the greatest
    block first, and argmax the entry within it, in a twentieth of the time.
    """
    return jax.lax.platform_dependent(
        logits,
        cpu=_most_likely_by_blocks,
        default=lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )


def _most_likely_by_blocks(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    rows, vocabulary = logits.shape
    # A divisor of the vocabulary: padding would copy the logits.
    size = max(n for n in range(1, 2 * _BLOCK + 1) if vocabulary % n == 0)
    blocks = logits.reshape(rows, vocabulary // size, size)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * size + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def top_k_mask(logits: Float[Array, "*B V"], top_k: int) -> Bool[Array, "*B V"]:
    """The `top_k` most likely tokens, and all that tie with the last of them."""
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    return logits >= kth


def min_p_mask(logits: Float[Array, "*B V"], min_p: float) -> Bool[Array, "*B V"]:
    """Tokens at least `min_p` times as likely as the most likely one (arXiv 2407.01082)."""
    return logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)


def penalize(
    logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"], penalty: float
) -> Float[Array, "*B V"]:
    """Penalizes tokens that occurred: l / penalty if l > 0, else l * penalty (CTRL, 1909.05858)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def categorical(
    logits: Float[Array, "B V"], keys: Array
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws from softmax(logits) by its inverse distribution function, in two levels.

    The first uniform number of a row chooses a block of tokens by the blocks' sums, the second one
    a token within it. Gumbel noise would need V numbers a row, which take longer than all other
    steps together. With one number instead of two, float32 would draw unlikely tokens too rarely.

    Args:
      logits: minus infinity for tokens that may not be drawn; finite for at least one.
      keys: [B] PRNG keys, one per row.

    Returns:
      Token ids, and log-sum-exp of the logits.
    """
    rows, vocabulary = logits.shape
    most = jnp.max(logits, axis=-1, keepdims=True)
    blocks = -(-vocabulary // _BLOCK)
    padding = ((0, 0), (0, blocks * _BLOCK - vocabulary))
    weights = jnp.pad(jnp.exp(logits - most), padding).reshape(rows, blocks, _BLOCK)
    sums = jnp.sum(weights, axis=-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _inverse(sums, uniform[:, 0])
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    ids = block * _BLOCK + _inverse(inside, uniform[:, 1])
    return ids.astype(jnp.int32), most[:, 0] + jnp.log(jnp.sum(sums, axis=-1))


def _inverse(weights: Float[Array, "B N"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first index whose running sum exceeds that share of the total; never a weight of 0."""
    running = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    # The share is below 1, so an index is found for any rounding of the running sum.
    share = uniform[:, None] * jnp.max(running, axis=-1, keepdims=True)
    return jnp.argmax(running > share, axis=-1)


def _mask(
    logits: Float[Array, "B V"], top_k: int, top_p: float, min_p: float
) -> Float[Array, "B V"]:
    """Minus infinity for tokens that may not be drawn; the same array if all may."""
    if top_k:
        logits = jnp.where(top_k_mask(logits, top_k), logits, -jnp.inf)
    if top_p < 1.0:
        logits = jnp.where(top_p_mask(logits, top_p), logits, -jnp.inf)
    if min_p > 0.0:
        logits = jnp.where(min_p_mask(logits, min_p), logits, -jnp.inf)
    return logits


def draw(
    logits: Float[Array, "B V"],
    keys: Array,
    temperature: float,
    top_p: float = 1.0,
    vocabulary: int = 0,
    *,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Bool[Array, "B V"] | None = None,
    forced: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Draws one token per row.

    Args:
      logits: of the next token.
      keys: [B] PRNG keys, one per row, so that a row's draw does not depend on the other rows.
      temperature: 0 takes the most likely token.
      top_p: nucleus mass, after the temperature; 1 keeps all tokens.
      vocabulary: ids from here on are never drawn; 0 for no limit.
      top_k: number of most likely tokens that are kept; 0 keeps all.
      min_p: least probability that is kept, relative to the most likely token's; 0 keeps all.
      repetition_penalty: see `penalize`; 1 for none.
      seen: the tokens that the penalty applies to.
      forced: ids that replace the draw; -1 for rows that draw.

    Returns:
      Token ids; their log-probabilities under the model (temperature 1, nothing masked); and their
      log-probabilities under the distribution that they were drawn from, 0 for greedy and forced
      tokens. In nats.
    """
    logits = logits.astype(jnp.float32)
    allowed = logits
    if seen is not None and repetition_penalty != 1.0:
        allowed = penalize(allowed, seen, repetition_penalty)
    if 0 < vocabulary < logits.shape[-1]:
        allowed = jnp.where(jnp.arange(logits.shape[-1]) < vocabulary, allowed, -jnp.inf)
    total = None  # log-sum-exp of the logits
    if temperature == 0.0:
        ids = most_likely(allowed)
        drawn_logps = jnp.zeros(ids.shape, jnp.float32)
    else:
        tempered = allowed if temperature == 1.0 else allowed / temperature
        tempered = _mask(tempered, top_k, top_p, min_p)
        ids, tempered_total = categorical(tempered, keys)
        drawn_logps = _at(tempered, ids) - tempered_total
        if tempered is logits:  # Nothing was masked or scaled: the sum is the same.
            total = tempered_total
    if forced is not None:
        drawn_logps = jnp.where(forced >= 0, 0.0, drawn_logps)
        ids = jnp.where(forced >= 0, forced, ids)
    if total is None:
        total = jax.nn.logsumexp(logits, axis=-1)
    logps = _at(logits, ids) - total
    return ids.astype(jnp.int32), logps, drawn_logps


def _at(scores: Array, ids: Array) -> Array:
    return jnp.take_along_axis(scores, ids[:, None], axis=-1)[:, 0]
