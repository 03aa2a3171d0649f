"""The device's side of the sampler: pure functions over rows that decode in a shared loop.

A batch is G groups of w rows. A group holds one prompt, whose keys and values are computed once,
are read-only and are shared by its rows; each row decodes one completion into a cache of its own.

The rows' caches are rings: every row writes this step's keys and values to the same ring slot, one
uniform in-place update whatever the rows' ages, and sees the slots that it wrote itself, which are
the last ones. So a row that ends can make room for another at any step, and nothing has to be
cleared or moved.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cipo_jax.models.decoder import Compute, DecoderConfig, decode_layers
from cipo_jax.ops.attention import KV, causal_attention, decode_attention, quantized
from cipo_jax.ops.sampling import draw
from cipo_jax.typing import Array, Bool, Float, Int, Params

IDLE = -1  # Stands for the token of a row that has nothing to do.

# Keys of another kind give other numbers where a batch has another size.
KEYS = "threefry2x32"

STOPPED_AT_LENGTH = 0
STOPPED_BY_ID = 1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when a row ends.

    Attributes:
      max_new_tokens: a row ends after so many tokens at the latest.
      stop_ids: a row ends with any of these, which is kept as its last token.
      temperature: 0 is greedy.
      top_p: nucleus; 1 keeps everything.
      vocabulary: ids from here on are padding of the embedding and never drawn; 0 for none.
      top_k: most likely tokens that are kept; 0 keeps everything.
      min_p: least probability that is kept, relative to the most likely token's; 0 for all.
      repetition_penalty: of tokens that the prompt or the row has, as in CTRL; 1 for none.
      think_budget: after so many tokens without `close_ids` they are forced (budget forcing, arXiv
        2501.19393); 0 for no limit.
      close_ids: the ids that close the think block.
      stop_texts: a row ends with the token that completes any of these texts.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    vocabulary: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    think_budget: int = 0
    close_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.think_budget and not self.close_ids:
            raise ValueError("think_budget needs close_ids, the ids that close the think block")

    def on_device(self) -> "SamplingParams":
        """The rules that a compiled program depends on; the others are the host's."""
        close_ids = self.close_ids if self.think_budget else ()
        return dataclasses.replace(self, max_new_tokens=0, stop_texts=(), close_ids=close_ids)

    def for_prompts(self) -> "SamplingParams":
        """The rules that computing prompts depends on."""
        return SamplingParams(0, (), repetition_penalty=self.repetition_penalty)


class Prompts(NamedTuple):
    """What the groups hold, read-only while their rows decode.

    Attributes:
      first: [G, D] final hidden state of each prompt's last token, from which a row's first token
        is drawn.
      lengths: [G] real tokens of each prompt.
      seen: [G, V] the tokens of each prompt; [G, 0] where there is no repetition penalty.
      cache: per layer, keys and values of leading axes G, K.
    """

    first: Float[Array, "G D"]
    lengths: Int[Array, " G"]
    seen: Bool[Array, "G V"]
    cache: list[KV]


class Rows(NamedTuple):
    """What each row is at.

    Attributes:
      token: the last token drawn.
      drawn: tokens drawn so far.
      limit: tokens after which it ends.
      active: whether it has a completion to go on with.
      keys: its PRNG key, of which token t folds in t.
      closed: whether its think block was closed.
      recent: [G, w, len(close_ids)] its last tokens, where there is a think budget.
      seen: [G, w, V] tokens drawn so far; [G, w, 0] where there is no repetition penalty.
    """

    token: Int[Array, "G w"]
    drawn: Int[Array, "G w"]
    limit: Int[Array, "G w"]
    active: Bool[Array, "G w"]
    keys: Array
    closed: Bool[Array, "G w"]
    recent: Int[Array, "G w m"]
    seen: Bool[Array, "G w V"]


class Decoding(NamedTuple):
    """What a decoding step changes.

    Attributes:
      head: the ring slot that was written last.
      rows: see `Rows`.
      cache: per layer, keys and values of the rows' own tokens, of leading axes G x w, K.
    """

    head: Int[Array, ""]
    rows: Rows
    cache: list[KV]


class Chunk(NamedTuple):
    """What came out of some decoding steps, for the host to read.

    Attributes:
      tokens: [G, w, N] the tokens drawn, `IDLE` where a row was idle or no step was made.
      logps: [G, w, N] their log-probabilities under the model at temperature 1.
      drawn_logps: [G, w, N] those under the distribution that they were drawn from.
      active: [G, w] rows that go on.
    """

    tokens: Int[Array, "G w N"]
    logps: Float[Array, "G w N"]
    drawn_logps: Float[Array, "G w N"]
    active: Bool[Array, "G w"]


class Completions(NamedTuple):
    """What was sampled by `generate`.

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


def generate(
    config: DecoderConfig,
    compute: Compute,
    rules: SamplingParams,
    params: Params,
    prompts: Int[Array, "P S"],
    lengths: Int[Array, " P"],
    keys: Array,
) -> Completions:
    """One batch from its prompts to the end of its last row, as a single function to be jitted.

    `sampling.sampler.Sampler` gives the same completions faster where there are more of them than
    rows, or where they end at different times.

    Args:
      config: the model's shape (static).
      compute: dtype and kernels (static).
      rules: how to draw and when to stop (static); stop texts do not count here.
      params: the decoding layout.
      prompts: token ids; what stands past a prompt's length has no influence.
      lengths: real tokens of each prompt, at least 1.
      keys: [P, n] PRNG keys. A row depends on its prompt and its key alone.

    Returns:
      The completions.
    """
    P, n = keys.shape
    limit, on_device = rules.max_new_tokens, rules.on_device()
    groups = prefill(config, compute, on_device.for_prompts(), False, params, prompts, lengths)
    _, decoding = empty(config, compute, on_device, False, (P, n, 1, limit))
    rows = decoding.rows._replace(
        limit=jnp.full((P, n), limit), active=jnp.ones((P, n), bool), keys=keys
    )
    decoding = decoding._replace(rows=rows)
    floor = jnp.zeros((), jnp.int32)
    _, out = decode(config, compute, on_device, limit, params, groups, decoding, floor)
    drawn = out.tokens != IDLE
    stops = jnp.any(out.tokens[..., None] == jnp.array(rules.stop_ids, jnp.int32), axis=(-2, -1))
    return Completions(
        ids=jnp.where(drawn, out.tokens, 0),
        logps=out.logps,
        lengths=jnp.sum(drawn, axis=-1),
        stops=jnp.where(stops, STOPPED_BY_ID, STOPPED_AT_LENGTH),
    )


def empty(
    config: DecoderConfig,
    compute: Compute,
    rules: SamplingParams,
    int8: bool,
    shape: tuple[int, int, int, int],
) -> tuple[Prompts, Decoding]:
    """G idle groups of w rows, S prompt slots and R ring slots; shape is (G, w, S, R)."""
    G, w, S, R = shape
    K, H = config.kv_heads, config.head_dim
    seen = config.vocab_size if rules.repetition_penalty != 1.0 else 0

    def cache(leading: int, slots: int) -> list[KV]:
        # Buffers of their own: what is donated must not be shared.
        def layer() -> KV:
            dtype = jnp.int8 if int8 else compute.dtype
            k = jnp.zeros((leading, K, H, slots), dtype)
            v = jnp.zeros((leading, K, slots, H), dtype)
            scales = [jnp.ones((leading, K, slots)) for _ in range(2)] if int8 else []
            return KV(k, v, *scales)

        return [layer() for _ in range(config.layers)]

    prompts = Prompts(
        first=jnp.zeros((G, config.d_model), compute.dtype),
        lengths=jnp.ones(G, jnp.int32),
        seen=jnp.zeros((G, seen), bool),
        cache=cache(G, slots=S),
    )
    rows = Rows(
        token=jnp.zeros((G, w), jnp.int32),
        drawn=jnp.zeros((G, w), jnp.int32),
        limit=jnp.zeros((G, w), jnp.int32),
        active=jnp.zeros((G, w), bool),
        keys=jnp.broadcast_to(jax.random.key(0, impl=KEYS), (G, w)),
        closed=jnp.zeros((G, w), bool),
        recent=jnp.full((G, w, len(rules.close_ids)), IDLE, jnp.int32),
        seen=jnp.zeros((G, w, seen), bool),
    )
    return prompts, Decoding(jnp.zeros((), jnp.int32), rows, cache(G * w, slots=R))


# ---- prompts into groups


def prefill(
    config: DecoderConfig,
    compute: Compute,
    rules: SamplingParams,
    int8: bool,
    params: Params,
    prompts: Int[Array, "P S"],
    lengths: Int[Array, " P"],
) -> Prompts:
    """Computes right-padded prompts, as groups by themselves.

    Args:
      config: the model's shape (static).
      compute: dtype and kernels (static).
      rules: how tokens are drawn (static).
      int8: whether the cache is kept as int8 (static).
      params: the decoding layout.
      prompts: token ids; what stands past a prompt's length has no influence.
      lengths: real tokens of each prompt, at least 1.
    """
    P, S = prompts.shape
    windows = _windows(config)

    def attend(layer: int, q: Array, k: Array, v: Array) -> tuple[Array, KV]:
        out = causal_attention(q, k, v, compute.attention, windows[layer])
        kv = KV(jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2))
        return out, quantized(kv) if int8 else kv

    positions = jnp.broadcast_to(jnp.arange(S), (P, S))
    known = jnp.broadcast_to(lengths[:, None], (P, S))
    with jax.named_scope("prefill"):
        hidden, cache = decode_layers(config, compute, params, prompts, positions, attend, known)
    first = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    seen = jnp.zeros((P, 0), bool)
    if rules.repetition_penalty != 1.0:
        real = jnp.where(positions < lengths[:, None], prompts, config.vocab_size)
        seen = jnp.zeros((P, config.vocab_size), bool)
        seen = seen.at[jnp.arange(P)[:, None], real].set(True, mode="drop")
    return Prompts(first, lengths, seen, cache)


def put_groups(
    old: Params, new: Params, source: Int[Array, " P"], into: Int[Array, " P"]
) -> Params:
    """Copies groups new[source] over old[into], of any arrays with leading G.

    No `into` beyond G counts. Arrays of `new` may be shorter along their other axes.
    """

    def one(old: Array, new: Array) -> Array:
        where = (into, *map(slice, new.shape[1:]))
        return old.at[where].set(new[source], mode="drop")

    return jax.tree.map(one, old, new)


def copy_groups(tree: Params, source: Int[Array, " P"], into: Int[Array, " P"]) -> Params:
    """Copies groups source over groups `into` of the same arrays; donate them.

    All are read before any is written. No `into` beyond G counts.
    """
    return jax.tree.map(lambda x: x.at[into].set(x[source], mode="drop"), tree)


def start_rows(
    rows: Rows,
    key: Int[Array, " k"],
    start: Bool[Array, "G w"],
    items: Int[Array, "G w"],
    samples: Int[Array, "G w"],
    limits: Int[Array, "G w"],
    closed: Bool[Array, "G w"],
) -> Rows:
    """Starts new completions in some rows.

    Args:
      rows: as they are.
      key: numbers of the PRNG key of all; a row's is fold_in(fold_in(key, item), sample).
      start: which rows start.
      items: of each row.
      samples: of each row.
      limits: tokens after which each row ends.
      closed: whether the think block was closed in the prompt already.
    """
    whole = jax.random.wrap_key_data(key, impl=KEYS)
    fold = jax.vmap(jax.vmap(lambda i, s: jax.random.fold_in(jax.random.fold_in(whole, i), s)))
    fresh = Rows(
        token=jnp.zeros_like(rows.token),
        drawn=jnp.zeros_like(rows.drawn),
        limit=limits,
        active=jnp.ones_like(rows.active),
        keys=fold(items, samples),
        closed=closed,
        recent=jnp.full_like(rows.recent, IDLE),
        seen=jnp.zeros_like(rows.seen),
    )

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(start.reshape(start.shape + (1,) * (old.ndim - 2)), new, old)

    return jax.tree.map(choose, fresh, rows)


def end_rows(rows: Rows, end: Bool[Array, "G w"]) -> Rows:
    """Ends the completions of some rows."""
    return rows._replace(active=rows.active & ~end)


# ---- other shapes


def take_groups(tree: Params, groups: Int[Array, " G"]) -> Params:
    """Arrays with leading G, for other groups."""
    return jax.tree.map(lambda x: x[groups], tree)


def take_prompts(kv: KV, groups: Int[Array, " G"], slots: int) -> KV:
    """A layer's keys and values of the prompts of other groups, in other prompt slots."""
    kv = take_groups(kv, groups)
    return _each(lambda x, axis: _resized(x, axis, slots), kv)


def take_rows(rows: Rows, taken: Int[Array, "G w"]) -> Rows:
    """Rows for another shape.

    Args:
      rows: as they are, [G', w'].
      taken: index of the old row in G' x w' for each new one; `IDLE` for none.
    """

    def one(x: Array) -> Array:
        return _by_row(x)[jnp.maximum(taken, 0)]

    rows = jax.tree.map(one, rows)
    return rows._replace(active=rows.active & (taken != IDLE))


def take_ring(kv: KV, taken: Int[Array, "G w"], head: Int[Array, ""], slots: int) -> KV:
    """A layer's ring of the rows of another shape, turned so that slot 0 is its oldest.

    The slot written last becomes the last of the new ring's, or of the old one's where the new one
    is longer: see `turned_head`. A ring that becomes shorter loses its oldest slots.
    """
    R = kv.v.shape[2]
    kept = min(R, slots)
    order = (head - (kept - 1) + jnp.arange(kept)) % R

    def one(x: Array, axis: int) -> Array:
        x = x[jnp.maximum(taken, 0).reshape(-1)]
        return _resized(jnp.take(x, order, axis=axis), axis, slots)

    return _each(one, kv)


def turned_head(old_slots: int, new_slots: int) -> int:
    """Where `take_ring` leaves the slot that was written last."""
    return min(old_slots, new_slots) - 1


def _each(function: Callable[..., Array], *kvs: KV) -> KV:
    """function(*arrays, axis of their slots), for each kind of array in caches."""
    k, v, *scales = zip(*(kv[: 4 if kv.k_scale is not None else 2] for kv in kvs), strict=True)
    # Keys have their slots last.
    return KV(function(*k, 3), function(*v, 2), *(function(*scale, 2) for scale in scales))


def _by_row(x: Array) -> Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _resized(x: Array, axis: int, size: int) -> Array:
    if size <= x.shape[axis]:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding)


# ---- the loop


def decode(
    config: DecoderConfig,
    compute: Compute,
    rules: SamplingParams,
    steps: int,
    params: Params,
    prompts: Prompts,
    decoding: Decoding,
    floor: Int[Array, ""],
) -> tuple[Decoding, Chunk]:
    """Makes up to `steps` decoding steps, and none once at most `floor` rows are active.

    Args:
      config: the model's shape (static).
      compute: dtype and kernels (static).
      rules: how to draw and when to stop (static).
      steps: at most (static).
      params: the decoding layout.
      prompts: of the groups.
      decoding: donate it. No active row may draw more tokens than its ring has slots, and one.
      floor: rows, below 1 to go on to the last.

    Returns:
      What it came to, and what was drawn.
    """
    G, w = decoding.rows.token.shape
    R = decoding.cache[0].v.shape[2]
    out = Chunk(
        tokens=jnp.full((G, w, steps), IDLE, jnp.int32),
        logps=jnp.zeros((G, w, steps), jnp.float32),
        drawn_logps=jnp.zeros((G, w, steps), jnp.float32),
        active=decoding.rows.active,
    )

    def unfinished(carry: tuple[Array, Decoding, Chunk]) -> Array:
        step, decoding, _ = carry
        return (step < steps) & (jnp.sum(decoding.rows.active) > jnp.maximum(floor, 0))

    def one(carry: tuple[Array, Decoding, Chunk]) -> tuple[Array, Decoding, Chunk]:
        step, decoding, out = carry
        rows = decoding.rows
        head = (decoding.head + 1) % R
        hidden, cache = _forward(config, compute, params, prompts, decoding, head)
        rows, drawn = _draw(rules, params, prompts, rows, hidden)

        def enter(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(old, new, step, axis=2)

        out = Chunk(*map(enter, out[:3], drawn), active=rows.active)
        return step + 1, Decoding(head, rows, cache), out

    _, decoding, out = jax.lax.while_loop(
        unfinished, one, (jnp.zeros((), jnp.int32), decoding, out)
    )
    return decoding, out


def _windows(config: DecoderConfig) -> list[int | None]:
    kinds = config.kinds()
    return [kinds[i].window for i in config.kind_ids()]


def _forward(
    config: DecoderConfig,
    compute: Compute,
    params: Params,
    prompts: Prompts,
    decoding: Decoding,
    head: Array,
) -> tuple[Float[Array, "G w D"], list[KV]]:
    """Final hidden states of each row's last token, whose keys and values enter at slot `head`."""
    rows, cache = decoding.rows, list(decoding.cache)
    G, w = rows.token.shape
    S, R = prompts.cache[0].v.shape[2], cache[0].v.shape[2]
    windows = _windows(config)

    # The row's token number drawn - 1 is being computed.
    position = prompts.lengths[:, None] + jnp.maximum(rows.drawn - 1, 0)
    age = (head - jnp.arange(R)) % R
    in_prompt = (jnp.arange(S) < prompts.lengths[:, None])[:, None]
    visible: dict[int | None, tuple[Array, Array]] = {
        None: (in_prompt, age < rows.drawn[..., None])
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
        cache[layer] = _each(
            lambda old, new, axis: jax.lax.dynamic_update_slice_in_dim(old, new, head, axis),
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
    return jnp.where((rows.drawn == 0)[..., None], prompts.first[:, None], hidden), cache


def _draw(
    rules: SamplingParams,
    params: Params,
    prompts: Prompts,
    rows: Rows,
    hidden: Float[Array, "G w D"],
) -> tuple[Rows, tuple[Array, Array, Array]]:
    """Draws the next token of each row, and ends the rows that are over."""
    G, w = rows.token.shape
    with jax.named_scope("head"):
        logits = jnp.dot(
            hidden.reshape(G * w, -1), params["head"], preferred_element_type=jnp.float32
        )
    keys = jax.vmap(jax.random.fold_in)(rows.keys.reshape(G * w), rows.drawn.reshape(G * w))
    seen = forced = None
    if rules.repetition_penalty != 1.0:
        seen = (prompts.seen[:, None] | rows.seen).reshape(G * w, -1)
    if rules.think_budget:
        over = rows.drawn - rules.think_budget
        close = jnp.array(rules.close_ids, jnp.int32)[jnp.clip(over, 0, len(rules.close_ids) - 1)]
        forced = jnp.where((over >= 0) & ~rows.closed, close, IDLE).reshape(G * w)
    drawn = draw(
        logits,
        keys,
        rules.temperature,
        rules.top_p,
        rules.vocabulary,
        top_k=rules.top_k,
        min_p=rules.min_p,
        repetition_penalty=rules.repetition_penalty,
        seen=seen,
        forced=forced,
    )
    token, logps, drawn_logps = (x.reshape(G, w) for x in drawn)
    token = jnp.where(rows.active, token, rows.token)
    so_far = rows.drawn + rows.active
    stops = jnp.any(token[..., None] == jnp.array(rules.stop_ids, jnp.int32), axis=-1)
    new = rows._replace(
        token=token, drawn=so_far, active=rows.active & ~stops & (so_far < rows.limit)
    )
    if rules.think_budget:
        recent = jnp.concatenate([rows.recent[..., 1:], token[..., None]], axis=-1)
        closes = jnp.all(recent == jnp.array(rules.close_ids, jnp.int32), axis=-1)
        new = new._replace(recent=recent, closed=rows.closed | closes)
    if rules.repetition_penalty != 1.0:
        new = new._replace(seen=rows.seen | jax.nn.one_hot(token, rows.seen.shape[-1], dtype=bool))
    shown = jnp.where(rows.active, token, IDLE)
    zero = jnp.zeros_like(logps)
    return new, (
        shown,
        jnp.where(rows.active, logps, zero),
        jnp.where(rows.active, drawn_logps, zero),
    )
