"""The sampler as a library: prompts in, completions out, in batches of one shape.

A row's result depends on its own prompt, item id and sample index alone; which rows share its batch
is a matter of speed.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cipo_jax.data.batches import bucket, fixed_batches
from cipo_jax.data.think import ThinkFormat
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params, decoding_layout
from cipo_jax.sampling.decode import (
    STOPPED_BY_ID,
    Completions,
    Decoding,
    Rules,
    completions,
    decode,
    generate,
    prefill,
)
from cipo_jax.training.mesh import batch_sharding, decoding_shardings, replicated
from cipo_jax.typing import Array, Params


class Request(NamedTuple):
    """A prompt to complete, and the id that its randomness is addressed by."""

    prompt: Sequence[int]
    item: int


class Completion(NamedTuple):
    """One sampled row.

    Attributes:
      ids: token ids, its stop id included.
      logps: their log-probabilities under the model at temperature 1.
      stopped: whether it ended by a stop id rather than by length.
    """

    ids: list[int]
    logps: list[float]
    stopped: bool


def rules_of(
    format: ThinkFormat, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0
) -> Rules:
    """Rules that end where a model's text ends, and draw nothing that its tokenizer lacks."""
    return Rules(max_new_tokens, format.stop_ids, temperature, top_p, format.vocabulary)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples completions of prompts, `rows` at a time.

    Attributes:
      config: the model's shape.
      compute: dtype and kernels of decoding.
      mesh: where rows (data x fsdp) and heads (tensor) lie.
      rows: completions decoded at a time.
    """

    config: DecoderConfig
    compute: Compute
    mesh: Mesh
    rows: int = 64

    @cached_property
    def _generate(self) -> Any:
        by_row, everywhere = batch_sharding(self.mesh), replicated(self.mesh)
        return jax.jit(
            generate,
            static_argnums=(0, 1, 2),
            in_shardings=(self._shardings, by_row, by_row, by_row),
            out_shardings=everywhere,
        )

    @cached_property
    def _shardings(self) -> Params:
        layout = jax.eval_shape(
            lambda p: decoding_layout(self.config, p, self.compute.dtype),
            abstract_params(self.config),
        )
        return decoding_shardings(layout, self.mesh)

    @cached_property
    def _prepare(self) -> Any:
        return jax.jit(
            lambda p: decoding_layout(self.config, p, self.compute.dtype),
            out_shardings=self._shardings,
        )

    def prepare(self, params: Params) -> Params:
        """Training layout (and adapters) -> decoding layout, on this sampler's mesh."""
        return self._prepare(params)

    def programs(self) -> int:
        """Decoding programs compiled so far, by all samplers of this model on this mesh."""
        return self._generate._cache_size()

    def batches(
        self, requests: Sequence[Request], samples: int = 1
    ) -> Iterator[tuple[list[Request], int]]:
        """Cuts requests into batches of one size: (requests, how many of them count)."""
        # Rows of a batch must divide over the mesh.
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        size = bucket(max(self.rows // samples, 1), shards)
        return fixed_batches(requests, size)

    def stream(
        self,
        params: Params,
        requests: Sequence[Request],
        rules: Rules,
        key: Array,
        samples: int = 1,
    ) -> Iterator[list[list[Completion]]]:
        """Yields, batch by batch and in order, the `samples` completions of each request.

        Args:
          params: from `prepare`.
          requests: prompts and item ids.
          rules: how to draw and when to stop.
          key: PRNG key; row (item, sample) draws from fold_in(fold_in(key, item), sample).
          samples: completions per request.
        """
        if not requests:
            return
        longest = bucket(max(len(r.prompt) for r in requests))
        for batch, count in self.batches(requests, samples):
            yield self.run(params, batch, rules, key, samples, longest)[:count]

    def run(
        self,
        params: Params,
        batch: Sequence[Request],
        rules: Rules,
        key: Array,
        samples: int,
        prompt_slots: int,
    ) -> list[list[Completion]]:
        """Completes one batch, its prompts padded to `prompt_slots`."""
        inputs = _inputs(batch, key, samples, prompt_slots)
        out: Completions = jax.device_get(
            self._generate(self.config, self.compute, rules, params, *inputs)
        )
        return [[_row(out, i, j) for j in range(samples)] for i in range(len(batch))]

    def stream_tokens(
        self, params: Params, request: Request, rules: Rules, key: Array, chunk: int = 8
    ) -> Iterator[Completion]:
        """Yields one completion as it grows, `chunk` tokens at a time; the last is the whole.

        The next chunk is under way on the device while the present one is read. Its ids are those
        that `run` gives.
        """
        (batch, _), *_ = self.batches([request])
        inputs = _inputs(batch, key, 1, bucket(len(request.prompt)))
        state: Decoding = self._prefill(self.config, self.compute, rules, params, *inputs)
        while True:
            now = self._so_far(rules, state)  # Before the state is donated.
            state = self._decode(self.config, self.compute, rules, params, state, chunk)
            completion = _row(jax.device_get(now), 0, 0)
            yield completion
            if completion.stopped or len(completion.ids) == rules.max_new_tokens:
                return

    @cached_property
    def _prefill(self) -> Any:
        by_row = batch_sharding(self.mesh)
        return jax.jit(
            prefill,
            static_argnums=(0, 1, 2),
            in_shardings=(self._shardings, by_row, by_row, by_row),
        )

    @cached_property
    def _decode(self) -> Any:
        return jax.jit(decode, static_argnums=(0, 1, 2, 5), donate_argnums=4)

    @cached_property
    def _so_far(self) -> Any:
        return jax.jit(completions, static_argnums=0, out_shardings=replicated(self.mesh))


def _inputs(
    batch: Sequence[Request], key: Array, samples: int, prompt_slots: int
) -> tuple[np.ndarray, np.ndarray, Array]:
    """Padded prompts, their lengths, and the keys of their samples."""
    prompts = np.zeros((len(batch), prompt_slots), np.int32)
    for i, request in enumerate(batch):
        prompts[i, : len(request.prompt)] = request.prompt
    lengths = np.array([len(r.prompt) for r in batch], np.int32)
    return prompts, lengths, _row_keys(key, np.array([r.item for r in batch], np.uint32), samples)


def _row(out: Completions, i: int, j: int) -> Completion:
    length = int(out.lengths[i, j])
    return Completion(
        out.ids[i, j, :length].tolist(),
        out.logps[i, j, :length].tolist(),
        bool(out.stops[i, j] == STOPPED_BY_ID),
    )


def _fold_rows(key: Array, items: Array, samples: Array) -> Array:
    item_keys = jax.vmap(lambda item: jax.random.fold_in(key, item))(items)
    return jax.vmap(lambda k: jax.vmap(lambda s: jax.random.fold_in(k, s))(samples))(item_keys)


_jitted_fold_rows = jax.jit(_fold_rows)


def _row_keys(key: Array, items: np.ndarray, samples: int) -> Array:
    """[P, n] keys, each addressed by its item and its sample index."""
    return _jitted_fold_rows(key, items, np.arange(samples, dtype=np.uint32))
