"""The sampler's compiled programs, and the batch of rows on the device that they change."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params, decoding_layout
from cipo_jax.sampling import decode, insert, reshape, state
from cipo_jax.sampling.params import SamplingParams
from cipo_jax.sampling.scheduler import BatchShape, Reshape
from cipo_jax.training.mesh import BATCH, batch_sharding, decoding_shardings, replicated
from cipo_jax.typing import Array, Bool, Int, Params


class Programs:
    """The device functions of the sampler, jitted: static and donated arguments, output shardings.

    Args:
      config: the model's shape.
      compute: dtype and kernels of decoding.
      mesh: groups lie over data x fsdp, heads over tensor.
    """

    def __init__(self, config: DecoderConfig, compute: Compute, mesh: Mesh):
        self.config, self.compute, self.mesh = config, compute, mesh
        # Groups, or groups x rows, lead; in keys and values the heads follow.
        groups, layer = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec(*BATCH, "tensor"))
        whole = replicated(mesh)
        prompts = state.Prompts(groups, groups, groups, layer)  # type: ignore[arg-type]
        decoding = state.DecodingState(whole, groups, layer)  # type: ignore[arg-type]

        def jit(function: Callable[..., Any], out_shardings: Any, **options: Any) -> Any:
            return jax.jit(function, out_shardings=out_shardings, **options)

        self.empty = jit(state.empty_state, (prompts, decoding), static_argnums=(0, 1, 2, 3, 4))
        self.prefill = jit(decode.prefill, prompts, static_argnums=(0, 1, 2, 3))
        self.decode = jit(
            decode.decode, (decoding, whole), static_argnums=(0, 1, 2, 3), donate_argnums=6
        )
        # The others are small. Those of a cache take one layer at a time, so that they compile
        # once for all layers and need no second cache.
        self.put_groups = jit(insert.put_groups, groups, donate_argnums=0)
        self.put_layer = jit(insert.put_groups, layer, donate_argnums=0)
        self.copy_groups = jit(insert.copy_groups, groups, donate_argnums=0)
        self.copy_layer = jit(insert.copy_groups, layer, donate_argnums=0)
        self.start_rows = jit(insert.start_rows, groups, donate_argnums=0)
        self.end_rows = jit(insert.end_rows, groups, donate_argnums=0)
        self.take_groups = jit(reshape.take_groups, groups)
        self.take_prompts = jit(reshape.take_prompts, layer, static_argnums=2)
        self.take_rows = jit(reshape.take_rows, groups)
        self.take_ring = jit(reshape.take_ring, layer, static_argnums=3)

    @functools.cached_property
    def prepare(self) -> Callable[[Params], Params]:
        """Training layout -> decoding layout; built on first use, since it needs a trace."""

        def layout(params: Params) -> Params:
            return decoding_layout(self.config, params, self.compute.dtype)

        shapes = jax.eval_shape(layout, abstract_params(self.config))
        return jax.jit(layout, out_shardings=decoding_shardings(shapes, self.mesh))


@functools.cache
def programs_for(config: DecoderConfig, compute: Compute, mesh: Mesh) -> Programs:
    """The programs by value: equal samplers share them and what is compiled for them."""
    return Programs(config, compute, mesh)


class DeviceBatch:
    """The rows that decode together: all that one job has on the device.

    Args:
      programs: that change it.
      sampling_params: from `SamplingParams.on_device`.
      int8: whether keys and values are int8.
      shape: its first shape; all rows are idle.
    """

    def __init__(
        self, programs: Programs, sampling_params: SamplingParams, int8: bool, shape: BatchShape
    ):
        self._programs, self._sampling_params, self._int8 = programs, sampling_params, int8
        self._model = programs.config, programs.compute
        empty = programs.empty(*self._model, sampling_params, int8, tuple(shape))
        self._prompts: state.Prompts = empty[0]
        self._state: state.DecodingState = empty[1]

    def prefill(
        self,
        params: Params,
        ids: Int[np.ndarray, "P S"],
        lengths: Int[np.ndarray, " P"],
        into: Int[np.ndarray, " P"],
    ) -> None:
        """Computes right-padded prompts into groups; entries of `into` beyond G are ignored."""
        programs, old = self._programs, self._prompts
        sampling_params = self._sampling_params.for_prefill()
        new = programs.prefill(*self._model, sampling_params, self._int8, params, ids, lengths)
        source = np.arange(len(ids), dtype=np.int32)
        cache = [
            programs.put_layer(kv, other, source, into)
            for kv, other in zip(old.cache, new.cache, strict=True)
        ]
        others = programs.put_groups(old._replace(cache=[]), new._replace(cache=[]), source, into)
        self._prompts = others._replace(cache=cache)

    def copy(self, source: Int[np.ndarray, " P"], into: Int[np.ndarray, " P"]) -> None:
        """Copies prompts from groups to groups; entries of `into` beyond G are ignored."""
        programs, old = self._programs, self._prompts
        cache = [programs.copy_layer(kv, source, into) for kv in old.cache]
        others = programs.copy_groups(old._replace(cache=[]), source, into)
        self._prompts = others._replace(cache=cache)

    def start(self, *starts: np.ndarray) -> None:
        """Starts completions; arguments as in `sampling.insert.start_rows`, from `key` on."""
        rows = self._programs.start_rows(self._state.rows, *starts)
        self._state = self._state._replace(rows=rows)

    def end(self, rows: Bool[np.ndarray, "G w"]) -> None:
        """Ends the completions of some rows."""
        ended = self._programs.end_rows(self._state.rows, rows)
        self._state = self._state._replace(rows=ended)

    def reshape(self, old: BatchShape, change: Reshape) -> None:
        """Changes the shape from `old` to that of `change`."""
        programs, new = self._programs, change.shape
        groups, rows = np.array(change.groups, np.int32), np.array(change.rows, np.int32)
        if (old.groups, old.prompt_slots) != (new.groups, new.prompt_slots):
            cache = list(self._prompts.cache)
            self._prompts = self._prompts._replace(cache=[])
            for i, kv in enumerate(cache):  # Each layer's old cache is freed before the next.
                cache[i] = programs.take_prompts(kv, groups, new.prompt_slots)
            others = programs.take_groups(self._prompts, groups)
            self._prompts = others._replace(cache=cache)
        if (old.groups, old.width) != (new.groups, new.width):
            taken = programs.take_rows(self._state.rows, rows)
            self._state = self._state._replace(rows=taken)
        if old._replace(prompt_slots=0) != new._replace(prompt_slots=0):
            ring = list(self._state.cache)
            self._state = self._state._replace(cache=[])
            for i, kv in enumerate(ring):
                ring[i] = programs.take_ring(kv, rows, self._state.newest_slot, new.ring_slots)
            newest_slot = self._newest_slot(old, new)
            self._state = self._state._replace(cache=ring, newest_slot=newest_slot)

    def _newest_slot(self, old: BatchShape, new: BatchShape) -> Array:
        slot = np.int32(reshape.rotated_newest_slot(old.ring_slots, new.ring_slots))
        return jax.device_put(slot, replicated(self._programs.mesh))

    def decode(self, params: Params, steps: int, min_active: int) -> state.Chunk:
        """Dispatches up to `steps` decoding steps; they stop at `min_active` active rows."""
        self._state, chunk = self._programs.decode(
            *self._model,
            self._sampling_params,
            steps,
            params,
            self._prompts,
            self._state,
            np.int32(min_active),
        )
        return chunk
