"""Drawing the next token: greedy, temperature, top-p. Arrays in, arrays out."""

import jax
import jax.numpy as jnp

from cipo_jax.typing import Array, Bool, Float, Int

_BISECTIONS = 40


def top_p_mask(logits: Float[Array, "*B V"], top_p: float) -> Bool[Array, "*B V"]:
    """The smallest set of most likely tokens whose probability reaches `top_p`, without a sort.

    Bisection finds the largest probability threshold whose tokens still sum to `top_p` (nucleus
    sampling, Holtzman et al. 2020); tokens that tie with the last one are kept. A sort of V numbers
    costs several times as much on every backend.

    Args:
      logits: unnormalised log-probabilities.
      top_p: mass to keep, in (0, 1].

    Returns:
      True where a token may be drawn; the most likely token always may.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    high = jnp.max(probs, axis=-1, keepdims=True)
    low = jnp.zeros_like(high)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        mass = jnp.sum(jnp.where(probs >= middle, probs, 0.0), axis=-1, keepdims=True)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
    return (probs >= low) | (probs == high)


def draw(
    logits: Float[Array, "B V"],
    keys: Array,
    temperature: float,
    top_p: float,
    vocabulary: int = 0,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token a row.

    Args:
      logits: of the next token.
      keys: [B] PRNG keys, one a row, so that a row's draw owes nothing to the others.
      temperature: 0 takes the most likely token.
      top_p: nucleus, applied after the temperature; 1 keeps everything.
      vocabulary: ids from here on are never drawn; 0 for none.

    Returns:
      Token ids, and their log-probabilities under the model itself (temperature 1, no nucleus).
    """
    logits = logits.astype(jnp.float32)
    allowed = logits
    if 0 < vocabulary < logits.shape[-1]:
        allowed = jnp.where(jnp.arange(logits.shape[-1]) < vocabulary, logits, -jnp.inf)
    if temperature == 0.0:
        ids = jnp.argmax(allowed, axis=-1)
    else:
        warm = allowed / temperature
        if top_p < 1.0:
            warm = jnp.where(top_p_mask(warm, top_p), warm, -jnp.inf)
        ids = jax.vmap(jax.random.categorical)(keys, warm)
    logps = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return ids.astype(jnp.int32), logps - jax.nn.logsumexp(logits, axis=-1)
