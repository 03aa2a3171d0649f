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
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0


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


class _Loop(NamedTuple):
    """The carry of the decoding loop.

    Attributes:
      slot: response slot that the next token of every row is written to.
      token: [P, n] last drawn token of each row.
      ended: [P, n] rows that have drawn a stop id.
      ids: [P, n, R] tokens so far.
      logps: [P, n, R] their log-probabilities.
      cache: per layer, (keys, values) of the response, each [P, n, K, R, H].
    """

    slot: Int[Array, ""]
    token: Int[Array, "P n"]
    ended: Bool[Array, "P n"]
    ids: Int[Array, "P n R"]
    logps: Float[Array, "P n R"]
    cache: list[tuple[Array, Array]]


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
    P, S = prompts.shape
    n, R = keys.shape[1], rules.max_new_tokens
    stop_ids = jnp.array(rules.stop_ids, jnp.int32)

    def next_token(hidden: Array, slot: Array) -> tuple[Array, Array]:
        with jax.named_scope("head"):
            logits = jnp.dot(
                hidden.reshape(P * n, -1), params["head"], preferred_element_type=jnp.float32
            )
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, slot))(keys.reshape(P * n))
        ids, logps = draw(logits, step_keys, rules.temperature, rules.top_p)
        return ids.reshape(P, n), logps.reshape(P, n)

    def record(state: _Loop, token: Array, logps: Array, slot: Array) -> _Loop:
        live = ~state.ended
        ids = jax.lax.dynamic_update_index_in_dim(
            state.ids, jnp.where(live, token, 0), slot, axis=2
        )
        all_logps = jax.lax.dynamic_update_index_in_dim(
            state.logps, jnp.where(live, logps, 0.0), slot, axis=2
        )
        stops = jnp.any(token[..., None] == stop_ids, axis=-1)
        return state._replace(token=token, ended=state.ended | stops, ids=ids, logps=all_logps)

    # Prefill.
    def attend_prompt(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple]:
        del layer
        out = causal_attention(q, k, v, compute.attention)
        return out, (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))

    positions = jnp.broadcast_to(jnp.arange(S), (P, S))
    with jax.named_scope("prefill"):
        hidden, prompt_cache = decode_layers(
            config, compute, params, prompts, positions, attend_prompt
        )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    last = jnp.broadcast_to(last, (P, n, last.shape[-1]))
    token, logps = next_token(last, jnp.zeros((), jnp.int32))
    cache_shape = (P, n, config.kv_heads, R, config.head_dim)
    empty = _Loop(
        slot=jnp.zeros((), jnp.int32),
        token=token,
        ended=jnp.zeros((P, n), bool),
        ids=jnp.zeros((P, n, R), jnp.int32),
        logps=jnp.zeros((P, n, R), jnp.float32),
        cache=[
            (jnp.zeros(cache_shape, compute.dtype), jnp.zeros(cache_shape, compute.dtype))
            for _ in range(config.layers)
        ],
    )
    state = record(empty, token, logps, jnp.zeros((), jnp.int32))

    # Decode: the token of slot t enters the cache at slot t and yields the token of slot t + 1.
    def unfinished(state: _Loop) -> Array:
        return (state.slot < R - 1) & ~jnp.all(state.ended)

    def step(state: _Loop) -> _Loop:
        cache = list(state.cache)

        def attend(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, None]:
            K, H = k.shape[-2:]
            keys_, values = cache[layer]
            keys_ = jax.lax.dynamic_update_slice_in_dim(
                keys_, k.reshape(P, n, K, 1, H), state.slot, axis=3
            )
            values = jax.lax.dynamic_update_slice_in_dim(
                values, v.reshape(P, n, K, 1, H), state.slot, axis=3
            )
            cache[layer] = (keys_, values)
            prompt_keys, prompt_values = prompt_cache[layer]
            out = decode_attention(
                q.reshape(P, n, *q.shape[-2:]),
                prompt_keys,
                prompt_values,
                lengths,
                keys_,
                values,
                state.slot,
            )
            return out.reshape(q.shape), None

        at = jnp.broadcast_to(lengths[:, None] + state.slot, (P, n)).reshape(P * n, 1)
        hidden, _ = decode_layers(
            config, compute, params, state.token.reshape(P * n, 1), at, attend
        )
        slot = state.slot + 1
        token, logps = next_token(hidden, slot)
        return record(state._replace(cache=cache), token, logps, slot)._replace(slot=slot)

    state = jax.lax.while_loop(unfinished, step, state)
    is_stop = jnp.any(state.ids[..., None] == stop_ids, axis=-1)
    first_stop = jnp.argmax(is_stop, axis=-1)
    return Completions(
        ids=state.ids,
        logps=state.logps,
        lengths=jnp.where(state.ended, first_stop + 1, R),
        stops=jnp.where(state.ended, STOPPED_BY_ID, STOPPED_AT_LENGTH),
    )
