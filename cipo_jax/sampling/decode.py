"""The jitted heart of the sampler: prefill, then a while loop over an explicit KV cache."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cipo_jax.models.decoder import Compute, DecoderConfig, decode_layers
from cipo_jax.ops.attention import causal_attention, decode_attention
from cipo_jax.ops.sampling import draw
from cipo_jax.typing import Array, Bool, Float, Int, Params

STOPPED_AT_LENGTH = 0
STOPPED_BY_ID = 1


@dataclasses.dataclass(frozen=True)
class Rules:
    """How tokens are drawn and when a row ends.

    Attributes:
      max_new_tokens: a row ends after so many tokens at the latest.
      stop_ids: a row ends with any of these, which is kept as its last token.
      temperature: 0 is greedy.
      top_p: nucleus; 1 keeps everything.
      vocabulary: ids from here on are padding of the embedding and never drawn; 0 for none.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    vocabulary: int = 0


class Completions(NamedTuple):
    """What was sampled: P prompts x n samples x R slots.

    Attributes:
      ids: [P, n, R] token ids; zero past a row's length.
      logps: [P, n, R] their log-probabilities under the model at temperature 1; zero past it.
      lengths: [P, n] tokens of each row, its stop id included.
      stops: [P, n] STOPPED_BY_ID or STOPPED_AT_LENGTH.
    """

    ids: Int[Array, "P n R"]
    logps: Float[Array, "P n R"]
    lengths: Int[Array, "P n"]
    stops: Int[Array, "P n"]


class Decoding(NamedTuple):
    """A batch in the middle of its decoding.

    Attributes:
      slot: response slot that the last token of every row was written to.
      token: [P, n] last drawn token of each row.
      ended: [P, n] rows that have drawn a stop id.
      ids: [P, n, R] tokens so far.
      logps: [P, n, R] their log-probabilities.
      cache: per layer, (keys, values) of the response, each [P, n, K, R, H].
      prompt_cache: per layer, (keys, values) of the prompt, each [P, K, S, H]; read-only.
      lengths: [P] real tokens of each prompt.
      keys: [P, n] PRNG keys.
    """

    slot: Int[Array, ""]
    token: Int[Array, "P n"]
    ended: Bool[Array, "P n"]
    ids: Int[Array, "P n R"]
    logps: Float[Array, "P n R"]
    cache: list[tuple[Array, Array]]
    prompt_cache: list[tuple[Array, Array]]
    lengths: Int[Array, " P"]
    keys: Array


def generate(
    config: DecoderConfig,
    compute: Compute,
    rules: Rules,
    params: Params,
    prompts: Int[Array, "P S"],
    lengths: Int[Array, " P"],
    keys: Array,
) -> Completions:
    """Samples n completions of each prompt; a prompt is prefilled once for all of its samples.

    Prompts are right-padded, their keys and values stay read-only, and every row writes its own
    cache at the same slot: there is no left padding, and one uniform in-place update a step.

    Args:
      config: the model's shape (static).
      compute: dtype and kernels (static).
      rules: how to draw and when to stop (static).
      params: the decoding layout.
      prompts: token ids; what stands past a prompt's length has no influence.
      lengths: real tokens of each prompt, at least 1.
      keys: [P, n] PRNG keys. A row depends on its prompt and its key alone.

    Returns:
      The completions.
    """
    state = prefill(config, compute, rules, params, prompts, lengths, keys)
    state = decode(config, compute, rules, params, state, rules.max_new_tokens)
    return completions(rules, state)


def prefill(
    config: DecoderConfig,
    compute: Compute,
    rules: Rules,
    params: Params,
    prompts: Int[Array, "P S"],
    lengths: Int[Array, " P"],
    keys: Array,
) -> Decoding:
    """Reads the prompts and draws the first token of every row; arguments as in `generate`."""
    P, S = prompts.shape
    n, R = keys.shape[1], rules.max_new_tokens
    windows = _windows(config)

    def attend(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        out = causal_attention(q, k, v, compute.attention, windows[layer])
        return out, (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))

    positions = jnp.broadcast_to(jnp.arange(S), (P, S))
    known = jnp.broadcast_to(lengths[:, None], (P, S))
    with jax.named_scope("prefill"):
        hidden, prompt_cache = decode_layers(
            config, compute, params, prompts, positions, attend, known
        )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    last = jnp.broadcast_to(last, (P, n, last.shape[-1]))
    empty = jnp.zeros((P, n, config.kv_heads, R, config.head_dim), compute.dtype)
    state = Decoding(
        slot=jnp.zeros((), jnp.int32),
        token=jnp.zeros((P, n), jnp.int32),
        ended=jnp.zeros((P, n), bool),
        ids=jnp.zeros((P, n, R), jnp.int32),
        logps=jnp.zeros((P, n, R), jnp.float32),
        cache=[(empty, empty) for _ in range(config.layers)],
        prompt_cache=prompt_cache,
        lengths=lengths,
        keys=keys,
    )
    return _draw(rules, params, state, last, jnp.zeros((), jnp.int32))


def decode(
    config: DecoderConfig,
    compute: Compute,
    rules: Rules,
    params: Params,
    state: Decoding,
    steps: int,
) -> Decoding:
    """Draws up to `steps` further tokens of every row; fewer where all rows have ended.

    The token of slot t enters the cache at slot t and yields the token of slot t + 1.
    """
    P, n, R = state.ids.shape
    last = jnp.minimum(state.slot + steps, R - 1)
    windows = _windows(config)
    # What never changes stays out of the loop's carry.
    fixed = {"prompt_cache": state.prompt_cache, "lengths": state.lengths, "keys": state.keys}
    nothing = {"prompt_cache": [], "lengths": (), "keys": ()}

    def step(state: Decoding) -> Decoding:
        state = state._replace(**fixed)
        cache = list(state.cache)

        def attend(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, None]:
            K, H = k.shape[-2:]
            cache[layer] = tuple(  # type: ignore[assignment]
                jax.lax.dynamic_update_slice_in_dim(
                    old, new.reshape(P, n, K, 1, H), state.slot, axis=3
                )
                for old, new in zip(cache[layer], (k, v), strict=True)
            )
            out = decode_attention(
                q.reshape(P, n, *q.shape[-2:]),
                *state.prompt_cache[layer],
                state.lengths,
                *cache[layer],
                state.slot,
                windows[layer],
            )
            return out.reshape(q.shape), None

        at = jnp.broadcast_to(state.lengths[:, None] + state.slot, (P, n)).reshape(P * n, 1)
        hidden, _ = decode_layers(
            config, compute, params, state.token.reshape(P * n, 1), at, attend
        )
        slot = state.slot + 1
        state = _draw(rules, params, state._replace(cache=cache), hidden, slot)
        return state._replace(**nothing)

    def unfinished(state: Decoding) -> Array:
        return (state.slot < last) & ~jnp.all(state.ended)

    state = jax.lax.while_loop(unfinished, step, state._replace(**nothing))
    return state._replace(**fixed)


def completions(rules: Rules, state: Decoding) -> Completions:
    """What a batch has come to so far."""
    is_stop = jnp.any(state.ids[..., None] == _stop_ids(rules), axis=-1)
    first_stop = jnp.argmax(is_stop, axis=-1)
    return Completions(
        ids=state.ids,
        logps=state.logps,
        lengths=jnp.where(state.ended, first_stop + 1, state.slot + 1),
        stops=jnp.where(state.ended, STOPPED_BY_ID, STOPPED_AT_LENGTH),
    )


def _windows(config: DecoderConfig) -> list[int | None]:
    kinds = config.kinds()
    return [kinds[i].window for i in config.kind_ids()]


def _stop_ids(rules: Rules) -> Array:
    return jnp.array(rules.stop_ids, jnp.int32)


def _draw(rules: Rules, params: Params, state: Decoding, hidden: Array, slot: Array) -> Decoding:
    """Draws the token of a slot from final hidden states, and enters it for rows still going."""
    P, n = state.token.shape
    with jax.named_scope("head"):
        logits = jnp.dot(
            hidden.reshape(P * n, -1), params["head"], preferred_element_type=jnp.float32
        )
    keys = jax.vmap(lambda key: jax.random.fold_in(key, slot))(state.keys.reshape(P * n))
    token, logps = draw(logits, keys, rules.temperature, rules.top_p, rules.vocabulary)
    token, logps = token.reshape(P, n), logps.reshape(P, n)
    live = ~state.ended

    def enter(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(old, new, slot, axis=2)

    stops = jnp.any(token[..., None] == _stop_ids(rules), axis=-1)
    return state._replace(
        slot=slot,
        token=token,
        ended=state.ended | stops,
        ids=enter(state.ids, jnp.where(live, token, 0)),
        logps=enter(state.logps, jnp.where(live, logps, 0.0)),
    )
