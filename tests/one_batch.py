"""Sampling of one batch as a single pure function: the reference of the sampler's tests."""

from typing import NamedTuple

import jax.numpy as jnp

from cipo_jax.models.decoder import Compute, DecoderConfig
from cipo_jax.sampling import SamplingParams
from cipo_jax.sampling.decode import decode, prefill
from cipo_jax.sampling.state import IDLE, empty_state
from cipo_jax.typing import Array, Float, Int, Params

STOPPED_AT_LENGTH = 0
STOPPED_BY_ID = 1


class Completions(NamedTuple):
    """The completions of a batch.

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
    sampling_params: SamplingParams,
    params: Params,
    prompts: Int[Array, "P S"],
    lengths: Int[Array, " P"],
    keys: Array,
) -> Completions:
    """Decodes one batch from its prompts to the end of its last row.

    Args:
      config: the model's shape (static).
      compute: dtype and kernels (static).
      sampling_params: how to draw and when to stop (static); stop texts are ignored.
      params: the decoding layout.
      prompts: token ids; those past a prompt's length have no influence.
      lengths: real tokens of each prompt, at least 1.
      keys: [P, n] PRNG keys. A row depends on its prompt and its key alone.
    """
    P, n = keys.shape
    limit, on_device = sampling_params.max_new_tokens, sampling_params.on_device()
    groups = prefill(config, compute, on_device.for_prefill(), False, params, prompts, lengths)
    _, state = empty_state(config, compute, on_device, False, (P, n, 1, limit))
    rows = state.rows._replace(
        limit=jnp.full((P, n), limit), active=jnp.ones((P, n), bool), keys=keys
    )
    state = state._replace(rows=rows)
    min_active = jnp.zeros((), jnp.int32)
    _, chunk = decode(config, compute, on_device, limit, params, groups, state, min_active)
    drawn = chunk.tokens != IDLE
    stop_ids = jnp.array(sampling_params.stop_ids, jnp.int32)
    stops = jnp.any(chunk.tokens[..., None] == stop_ids, axis=(-2, -1))
    return Completions(
        ids=jnp.where(drawn, chunk.tokens, 0),
        logps=chunk.logps,
        lengths=jnp.sum(drawn, axis=-1),
        stops=jnp.where(stops, STOPPED_BY_ID, STOPPED_AT_LENGTH),
    )
