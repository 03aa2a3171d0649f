"""Drawing the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty.

Arrays in, arrays out. The order of the rules is that of Hugging Face's ``generate``: penalty,
temperature, top-k, top-p, min-p.
"""

import functools

import jax
import jax.numpy as jnp

from cipo_jax.typing import Array, Bool, Float, Int

_BISECTIONS = 40
_LIKELY = 64
_BLOCK = 256  # tokens whose probabilities are summed before one of the sums is chosen


def top_p_mask(logits: Float[Array, "*B V"], top_p: float) -> Bool[Array, "*B V"]:
    """The smallest set of most likely tokens whose probability reaches `top_p`, without a sort.

    Nucleus sampling (Holtzman et al. 2020); tokens that tie with the last one are kept. Bisection
    finds the probability from which on tokens still sum to `top_p`, on CPU only for rows whose few
    most likely tokens do not. A sort of V numbers costs several times as much on every backend.

    Args:
      logits: unnormalized log-probabilities.
      top_p: mass to keep, in (0, 1].

    Returns:
      True where a token may be drawn; the most likely token always may.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    threshold = jax.lax.platform_dependent(
        probs,
        cpu=functools.partial(_threshold_of_likely, top_p=top_p),
        default=functools.partial(_threshold, top_p=top_p),
    )
    return (probs >= threshold) | (probs == jnp.max(probs, axis=-1, keepdims=True))


def _threshold(probs: Float[Array, "*B V"], top_p: float) -> Float[Array, "*B 1"]:
    """The least probability in the nucleus, or one between it and the next, by bisection."""
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
    """The same from the few most likely tokens, where they reach `top_p`, as they mostly do.

    40 passes over the vocabulary take a CPU far longer than its top 64. Which way a row goes is a
    matter of the row alone; only whether there is anything to bisect depends on the others.
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
    """The index of the greatest entry, the first of equals.

    XLA's argmax over a vocabulary is a slow loop on CPU; there the greatest block is found first,
    by a plain maximum, and then the entry within it, in a twentieth of the time.
    """
    return jax.lax.platform_dependent(
        logits,
        cpu=_most_likely_by_blocks,
        default=lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )


def _most_likely_by_blocks(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    rows, vocabulary = logits.shape
    # One that leaves no rest: padding would copy the logits.
    size = max(n for n in range(1, 2 * _BLOCK + 1) if vocabulary % n == 0)
    blocks = logits.reshape(rows, vocabulary // size, size)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * size + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def top_k_mask(logits: Float[Array, "*B V"], top_k: int) -> Bool[Array, "*B V"]:
    """The `top_k` most likely tokens, and whatever ties with the last of them."""
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
    return logits >= kth


def min_p_mask(logits: Float[Array, "*B V"], min_p: float) -> Bool[Array, "*B V"]:
    """Tokens at least `min_p` times as likely as the most likely one (arXiv 2407.01082)."""
    return logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)


def penalize(
    logits: Float[Array, "*B V"], seen: Bool[Array, "*B V"], penalty: float
) -> Float[Array, "*B V"]:
    """Makes tokens that were seen less likely: l / penalty if l > 0, else l * penalty (CTRL)."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def categorical(
    logits: Float[Array, "B V"], keys: Array
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws from softmax(logits) by its inverse distribution function, in two levels.

    A block of tokens is chosen by the blocks' sums, then a token within it. Two uniform numbers a
    row do what Gumbel noise needs V of, which would cost more than the rest of the rules together;
    two, and not one, so that unlikely tokens are drawn as often as they should be in float32 too.

    Args:
      logits: minus infinity where a token may not be drawn; finite for at least one.
      keys: [B] PRNG keys, one a row.

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
    """The first index at which the running sum exceeds that share of the whole; no weight of 0."""
    running = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    # The share is below 1, so an index is found however the running sum was rounded.
    share = uniform[:, None] * jnp.max(running, axis=-1, keepdims=True)
    return jnp.argmax(running > share, axis=-1)


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
    """Draws one token a row.

    Args:
      logits: of the next token.
      keys: [B] PRNG keys, one a row, so that a row's draw owes nothing to the others.
      temperature: 0 takes the most likely token.
      top_p: nucleus, applied after the temperature; 1 keeps everything.
      vocabulary: ids from here on are never drawn; 0 for none.
      top_k: most likely tokens that are kept; 0 keeps everything.
      min_p: least probability that is kept, relative to the most likely token's; 0 for all.
      repetition_penalty: see `penalize`; 1 for none.
      seen: the tokens that the penalty is for.
      forced: ids to take in place of a draw; -1 where a row is free.

    Returns:
      Token ids; their log-probabilities under the model itself (temperature 1, no rule); and their
      log-probabilities under the distribution that they were drawn from, which is 0 for greedy
      and forced tokens.
    """
    logits = logits.astype(jnp.float32)
    allowed = logits
    if seen is not None and repetition_penalty != 1.0:
        allowed = penalize(allowed, seen, repetition_penalty)
    if 0 < vocabulary < logits.shape[-1]:
        allowed = jnp.where(jnp.arange(logits.shape[-1]) < vocabulary, allowed, -jnp.inf)
    total = None  # log-sum-exp of the logits themselves
    if temperature == 0.0:
        ids = most_likely(allowed)
        drawn_logps = jnp.zeros(ids.shape, jnp.float32)
    else:
        warm = allowed if temperature == 1.0 else allowed / temperature
        if top_k:
            warm = jnp.where(top_k_mask(warm, top_k), warm, -jnp.inf)
        if top_p < 1.0:
            warm = jnp.where(top_p_mask(warm, top_p), warm, -jnp.inf)
        if min_p > 0.0:
            warm = jnp.where(min_p_mask(warm, min_p), warm, -jnp.inf)
        ids, warm_total = categorical(warm, keys)
        drawn_logps = _at(warm, ids) - warm_total
        if warm is logits:  # No rule has changed anything, so that they need not be summed again.
            total = warm_total
    if forced is not None:
        drawn_logps = jnp.where(forced >= 0, 0.0, drawn_logps)
        ids = jnp.where(forced >= 0, forced, ids)
    if total is None:
        total = jax.nn.logsumexp(logits, axis=-1)
    logps = _at(logits, ids) - total
    return ids.astype(jnp.int32), logps, drawn_logps


def _at(scores: Array, ids: Array) -> Array:
    return jnp.take_along_axis(scores, ids[:, None], axis=-1)[:, 0]
