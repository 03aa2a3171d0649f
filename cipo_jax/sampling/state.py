"""The sampler's arrays on the device: prompts of groups, rows that decode, ring caches.

A batch is G groups of w rows. A group holds one prompt, whose keys and values are computed once,
are read-only and are shared by its rows; each row decodes one completion into a cache of its own.

The rows' caches are rings. Every row writes this step's keys and values to the same ring slot, one
uniform in-place update whatever the rows' ages, and attends to the slots that it wrote itself,
which are the last ones. So another row can take the place of a row that ends, at any step, and
nothing has to be cleared or moved.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cipo_jax.models.decoder import Compute, DecoderConfig
from cipo_jax.ops.attention import KV
from cipo_jax.sampling.params import SamplingParams
from cipo_jax.typing import Array, Bool, Float, Int

IDLE = -1  # In place of a token or row index: the row has no completion.

# Keys of other implementations give other numbers in batches of another size.
KEY_IMPL = "threefry2x32"


class Prompts(NamedTuple):
    """The prompts of the groups; read-only while their rows decode.

    Attributes:
      last_hidden: [G, D] final hidden state of each prompt's last token; a row's first token is
        drawn from it.
      lengths: [G] real tokens of each prompt.
      seen: [G, V] which tokens occur in each prompt; [G, 0] without a repetition penalty.
      cache: per layer, keys and values with leading axes G, K.
    """

    last_hidden: Float[Array, "G D"]
    lengths: Int[Array, " G"]
    seen: Bool[Array, "G V"]
    cache: list[KV]


class Rows(NamedTuple):
    """The state of each row.

    Attributes:
      token: the last token drawn.
      num_drawn: tokens drawn so far.
      limit: greatest number of tokens.
      active: whether its completion goes on.
      keys: its PRNG key; token t is drawn with fold_in(key, t).
      closed: whether its think block is closed.
      recent: [G, w, len(close_ids)] its last tokens; len(close_ids) is 0 without a think budget.
      seen: [G, w, V] which tokens were drawn; [G, w, 0] without a repetition penalty.
    """

    token: Int[Array, "G w"]
    num_drawn: Int[Array, "G w"]
    limit: Int[Array, "G w"]
    active: Bool[Array, "G w"]
    keys: Array
    closed: Bool[Array, "G w"]
    recent: Int[Array, "G w m"]
    seen: Bool[Array, "G w V"]


class DecodingState(NamedTuple):
    """The arrays that a decoding step changes.

    Attributes:
      newest_slot: the ring slot that was written last.
      rows: see `Rows`.
      cache: per layer, keys and values of the rows' own tokens, with leading axes G x w, K.
    """

    newest_slot: Int[Array, ""]
    rows: Rows
    cache: list[KV]


class Chunk(NamedTuple):
    """The tokens of some decoding steps, for the host to read.

    Attributes:
      tokens: [G, w, N] the tokens drawn; `IDLE` where a row was idle or the step was not made.
      logps: [G, w, N] their log-probabilities under the model at temperature 1.
      drawn_logps: [G, w, N] those under the distribution that they were drawn from.
      active: [G, w] rows whose completions go on.
    """

    tokens: Int[Array, "G w N"]
    logps: Float[Array, "G w N"]
    drawn_logps: Float[Array, "G w N"]
    active: Bool[Array, "G w"]


def empty_state(
    config: DecoderConfig,
    compute: Compute,
    sampling_params: SamplingParams,
    int8: bool,
    shape: tuple[int, int, int, int],
) -> tuple[Prompts, DecodingState]:
    """G groups of w idle rows, S prompt slots and R ring slots; shape is (G, w, S, R)."""
    G, w, S, R = shape
    K, H = config.kv_heads, config.head_dim
    seen = config.vocab_size if sampling_params.repetition_penalty != 1.0 else 0

    def cache(leading: int, slots: int) -> list[KV]:
        # Each layer has buffers of its own: donated buffers must not be shared.
        def layer() -> KV:
            dtype = jnp.int8 if int8 else compute.dtype
            k = jnp.zeros((leading, K, H, slots), dtype)
            v = jnp.zeros((leading, K, slots, H), dtype)
            scales = [jnp.ones((leading, K, slots)) for _ in range(2)] if int8 else []
            return KV(k, v, *scales)

        return [layer() for _ in range(config.layers)]

    prompts = Prompts(
        last_hidden=jnp.zeros((G, config.d_model), compute.dtype),
        lengths=jnp.ones(G, jnp.int32),
        seen=jnp.zeros((G, seen), bool),
        cache=cache(G, slots=S),
    )
    rows = Rows(
        token=jnp.zeros((G, w), jnp.int32),
        num_drawn=jnp.zeros((G, w), jnp.int32),
        limit=jnp.zeros((G, w), jnp.int32),
        active=jnp.zeros((G, w), bool),
        keys=jnp.broadcast_to(jax.random.key(0, impl=KEY_IMPL), (G, w)),
        closed=jnp.zeros((G, w), bool),
        recent=jnp.full((G, w, len(sampling_params.close_ids)), IDLE, jnp.int32),
        seen=jnp.zeros((G, w, seen), bool),
    )
    return prompts, DecodingState(jnp.zeros((), jnp.int32), rows, cache(G * w, slots=R))


def map_slots(function: Callable[..., Array], *caches: KV) -> KV:
    """Applies function(*arrays, axis of the slots) to each kind of array of a layer's caches."""
    k, v, *scales = zip(*(kv[: 4 if kv.k_scale is not None else 2] for kv in caches), strict=True)
    # Keys have their slots last.
    return KV(function(*k, 3), function(*v, 2), *(function(*scale, 2) for scale in scales))
