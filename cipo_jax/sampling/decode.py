"""The two device programs that apply the model: prefill of prompts, and the decoding loop.

Pure functions of static settings, parameters and the arrays of `sampling.state`.
"""

import jax
import jax.numpy as jnp

from cipo_jax.models.decoder import Compute, DecoderConfig, decode_layers
from cipo_jax.ops.attention import KV, causal_attention, decode_attention, quantized
from cipo_jax.ops.sampling import draw
from cipo_jax.sampling.params import SamplingParams
from cipo_jax.sampling.state import IDLE, Chunk, DecodingState, Prompts, Rows, map_slots
from cipo_jax.typing import Array, Float, Int, Params


def prefill(
    config: DecoderConfig,
    compute: Compute,
    sampling_params: SamplingParams,
    int8: bool,
    params: Params,
    prompts: Int[Array, "P S"],
    lengths: Int[Array, " P"],
) -> Prompts:
    """Computes right-padded prompts, each as a group.

    Args:
      config: the model's shape (static).
      compute: dtype and kernels (static).
      sampling_params: from `SamplingParams.for_prefill` (static).
      int8: whether the cache is int8 (static).
      params: the decoding layout.
      prompts: token ids; those past a prompt's length have no influence.
      lengths: real tokens of each prompt, at least 1.
    """
    P, S = prompts.shape
    windows = _layer_windows(config)

    def attend(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, KV]:
        out = causal_attention(q, k, v, compute.attention, windows[layer])
        kv = KV(jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2))
        return out, quantized(kv) if int8 else kv

    positions = jnp.broadcast_to(jnp.arange(S), (P, S))
    seq_len_at_token = jnp.broadcast_to(lengths[:, None], (P, S))
    with jax.named_scope("prefill"):
        hidden, cache = decode_layers(
            config, compute, params, prompts, positions, attend, seq_len_at_token
        )
    last_hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    seen = jnp.zeros((P, 0), bool)
    if sampling_params.repetition_penalty != 1.0:
        real = jnp.where(positions < lengths[:, None], prompts, config.vocab_size)
        seen = jnp.zeros((P, config.vocab_size), bool)
        seen = seen.at[jnp.arange(P)[:, None], real].set(True, mode="drop")
    return Prompts(last_hidden, lengths, seen, cache)


def decode(
    config: DecoderConfig,
    compute: Compute,
    sampling_params: SamplingParams,
    steps: int,
    params: Params,
    prompts: Prompts,
    state: DecodingState,
    min_active: Int[Array, ""],
) -> tuple[DecodingState, Chunk]:
    """Makes up to `steps` decoding steps, and stops once at most `min_active` rows are active.

    Args:
      config: the model's shape (static).
      compute: dtype and kernels (static).
      sampling_params: from `SamplingParams.on_device` (static).
      steps: greatest number of steps (static).
      params: the decoding layout.
      prompts: of the groups.
      state: donate it. No active row may draw more tokens than its ring has slots, plus one.
      min_active: number of rows; below 1 to decode until the last row ends.

    Returns:
      The new state, and the tokens drawn.
    """
    G, w = state.rows.token.shape
    R = state.cache[0].v.shape[2]
    chunk = Chunk(
        tokens=jnp.full((G, w, steps), IDLE, jnp.int32),
        logps=jnp.zeros((G, w, steps), jnp.float32),
        drawn_logps=jnp.zeros((G, w, steps), jnp.float32),
        active=state.rows.active,
    )

    def unfinished(carry: tuple[Array, DecodingState, Chunk]) -> Array:
        step, state, _ = carry
        return (step < steps) & (jnp.sum(state.rows.active) > jnp.maximum(min_active, 0))

    def one(carry: tuple[Array, DecodingState, Chunk]) -> tuple[Array, DecodingState, Chunk]:
        step, state, chunk = carry
        slot = (state.newest_slot + 1) % R
        hidden, cache = _forward(config, compute, params, prompts, state, slot)
        rows, drawn = _draw(sampling_params, params, prompts, state.rows, hidden)

        def enter(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(old, new, step, axis=2)

        chunk = Chunk(*map(enter, chunk[:3], drawn), active=rows.active)
        return step + 1, DecodingState(slot, rows, cache), chunk

    _, state, chunk = jax.lax.while_loop(unfinished, one, (jnp.zeros((), jnp.int32), state, chunk))
    return state, chunk


def _layer_windows(config: DecoderConfig) -> list[int | None]:
    kinds = config.kinds()
    return [kinds[i].window for i in config.kind_ids()]


def _forward(
    config: DecoderConfig,
    compute: Compute,
    params: Params,
    prompts: Prompts,
    state: DecodingState,
    slot: Array,
) -> tuple[Float[Array, "G w D"], list[KV]]:
    """Final hidden states of each row's last token, and caches with its keys and values at `slot`.

    A row that has drawn nothing gets the hidden state of its prompt's last token.
    """
    rows, cache = state.rows, list(state.cache)
    G, w = rows.token.shape
    S, R = prompts.cache[0].v.shape[2], cache[0].v.shape[2]
    windows = _layer_windows(config)

    # The row's token number num_drawn - 1 is being computed.
    position = prompts.lengths[:, None] + jnp.maximum(rows.num_drawn - 1, 0)
    age = (slot - jnp.arange(R)) % R
    in_prompt = (jnp.arange(S) < prompts.lengths[:, None])[:, None]
    visible: dict[int | None, tuple[Array, Array]] = {
        None: (in_prompt, age < rows.num_drawn[..., None])
    }
    for window in set(windows) - {None}:
        assert window is not None
        near = jnp.arange(S) > position[..., None] - window
        visible[window] = (in_prompt & near, visible[None][1] & (age < window))

    def attend(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, None]:
        K, H = k.shape[-2:]
        new = KV(k.reshape(G * w, K, H, 1), v.reshape(G * w, K, 1, H))
        if cache[layer].k_scale is not None:
            new = quantized(new)
        cache[layer] = map_slots(
            lambda old, new, axis: jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis),
            cache[layer],
            new,
        )
        in_prompt, own = visible[windows[layer]]
        out = decode_attention(
            q.reshape(G, w, *q.shape[-2:]), prompts.cache[layer], in_prompt, cache[layer], own
        )
        return out.reshape(q.shape), None

    hidden, _ = decode_layers(
        config,
        compute,
        params,
        rows.token.reshape(G * w, 1),
        position.reshape(G * w, 1),
        attend,
    )
    hidden = hidden.reshape(G, w, -1)
    first = (rows.num_drawn == 0)[..., None]
    return jnp.where(first, prompts.last_hidden[:, None], hidden), cache


def _draw(
    sampling_params: SamplingParams,
    params: Params,
    prompts: Prompts,
    rows: Rows,
    hidden: Float[Array, "G w D"],
) -> tuple[Rows, tuple[Array, Array, Array]]:
    """Draws the next token of each row: the new rows, and (tokens, logps, drawn_logps)."""
    p, (G, w) = sampling_params, rows.token.shape
    with jax.named_scope("head"):
        logits = jnp.dot(
            hidden.reshape(G * w, -1), params["head"], preferred_element_type=jnp.float32
        )
    keys = jax.vmap(jax.random.fold_in)(rows.keys.reshape(G * w), rows.num_drawn.reshape(G * w))
    seen = forced = None
    if p.repetition_penalty != 1.0:
        seen = (prompts.seen[:, None] | rows.seen).reshape(G * w, -1)
    if p.think_budget:
        over = rows.num_drawn - p.think_budget
        close = jnp.array(p.close_ids, jnp.int32)[jnp.clip(over, 0, len(p.close_ids) - 1)]
        forced = jnp.where((over >= 0) & ~rows.closed, close, IDLE).reshape(G * w)
    drawn = draw(
        logits,
        keys,
        p.temperature,
        p.top_p,
        p.vocabulary,
        top_k=p.top_k,
        min_p=p.min_p,
        repetition_penalty=p.repetition_penalty,
        seen=seen,
        forced=forced,
    )
    token, logps, drawn_logps = (x.reshape(G, w) for x in drawn)
    token = jnp.where(rows.active, token, rows.token)
    tokens = jnp.where(rows.active, token, IDLE)
    zero = jnp.zeros_like(logps)
    return _advance(p, rows, token), (
        tokens,
        jnp.where(rows.active, logps, zero),
        jnp.where(rows.active, drawn_logps, zero),
    )


def _advance(sampling_params: SamplingParams, rows: Rows, token: Int[Array, "G w"]) -> Rows:
    """Enters the drawn tokens, and ends the rows that drew a stop id or reached their limit."""
    num_drawn = rows.num_drawn + rows.active
    stop_ids = jnp.array(sampling_params.stop_ids, jnp.int32)
    stops = jnp.any(token[..., None] == stop_ids, axis=-1)
    new = rows._replace(
        token=token,
        num_drawn=num_drawn,
        active=rows.active & ~stops & (num_drawn < rows.limit),
    )
    if sampling_params.think_budget:
        recent = jnp.concatenate([rows.recent[..., 1:], token[..., None]], axis=-1)
        closes = jnp.all(recent == jnp.array(sampling_params.close_ids, jnp.int32), axis=-1)
        new = new._replace(recent=recent, closed=rows.closed | closes)
    if sampling_params.repetition_penalty != 1.0:
        new = new._replace(seen=rows.seen | jax.nn.one_hot(token, rows.seen.shape[-1], dtype=bool))
    return new
