"""The device's programs of one sampler, and the batch of rows that they work on."""

from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params, decoding_layout
from cipo_jax.sampling import decode as device
from cipo_jax.sampling.decode import SamplingParams
from cipo_jax.sampling.schedule import Move, Shape
from cipo_jax.training.mesh import BATCH, batch_sharding, decoding_shardings, replicated
from cipo_jax.typing import Bool, Int, Params


class Programs:
    """The functions of `sampling.decode`, jitted: where results lie, what is donated or static.

    Args:
      config: the model's shape.
      compute: dtype and kernels of decoding.
      mesh: where groups (data x fsdp) and heads (tensor) lie.
    """

    def __init__(self, config: DecoderConfig, compute: Compute, mesh: Mesh):
        self.config, self.compute, self.mesh = config, compute, mesh
        # Groups, or groups x rows, lead; keys and values have their heads next.
        groups, layer = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec(*BATCH, "tensor"))
        whole = replicated(mesh)
        prompts = device.Prompts(groups, groups, groups, layer)  # type: ignore[arg-type]
        decoding = device.Decoding(whole, groups, layer)  # type: ignore[arg-type]

        def jit(function: Any, made: Any, **options: Any) -> Any:
            return jax.jit(function, out_shardings=made, **options)

        self.empty = jit(device.empty, (prompts, decoding), static_argnums=(0, 1, 2, 3, 4))
        self.prefill = jit(device.prefill, prompts, static_argnums=(0, 1, 2, 3))
        self.decode = jit(
            device.decode, (decoding, whole), static_argnums=(0, 1, 2, 3), donate_argnums=6
        )
        # The others are small: those of a cache work on one layer at a time, so that they are
        # compiled once for all and need no second cache.
        self.put_groups = jit(device.put_groups, groups, donate_argnums=0)
        self.put_layer = jit(device.put_groups, layer, donate_argnums=0)
        self.copy_groups = jit(device.copy_groups, groups, donate_argnums=0)
        self.copy_layer = jit(device.copy_groups, layer, donate_argnums=0)
        self.start_rows = jit(device.start_rows, groups, donate_argnums=0)
        self.end_rows = jit(device.end_rows, groups, donate_argnums=0)
        self.take_groups = jit(device.take_groups, groups)
        self.take_prompts = jit(device.take_prompts, layer, static_argnums=2)
        self.take_rows = jit(device.take_rows, groups)
        self.take_ring = jit(device.take_ring, layer, static_argnums=3)

    @cached_property
    def prepare(self) -> Any:
        """Training layout -> decoding layout; made when it is asked for, as it needs a trace."""

        def layout(params: Params) -> Params:
            return decoding_layout(self.config, params, self.compute.dtype)

        shapes = jax.eval_shape(layout, abstract_params(self.config))
        return jax.jit(layout, out_shardings=decoding_shardings(shapes, self.mesh))


class Batch:
    """Rows that decode together: what one call of the sampler has on the device.

    Args:
      programs: that change it.
      rules: how tokens are drawn, from `SamplingParams.on_device`.
      int8: whether keys and values are kept as int8.
      shape: its first; all its rows are idle.
    """

    def __init__(self, programs: Programs, rules: SamplingParams, int8: bool, shape: Shape):
        self._programs, self._rules, self._int8 = programs, rules, int8
        self._model = programs.config, programs.compute
        empty = programs.empty(*self._model, rules, int8, tuple(shape))
        self._prompts: device.Prompts = empty[0]
        self._decoding: device.Decoding = empty[1]

    def prefill(
        self,
        params: Params,
        ids: Int[np.ndarray, "P S"],
        lengths: Int[np.ndarray, " P"],
        into: Int[np.ndarray, " P"],
    ) -> None:
        """Computes right-padded prompts and puts them into groups; no `into` beyond G counts."""
        programs, old = self._programs, self._prompts
        rules = self._rules.for_prompts()
        new = programs.prefill(*self._model, rules, self._int8, params, ids, lengths)
        source = np.arange(len(ids), dtype=np.int32)
        cache = [
            programs.put_layer(kv, other, source, into)
            for kv, other in zip(old.cache, new.cache, strict=True)
        ]
        heads = programs.put_groups(old._replace(cache=[]), new._replace(cache=[]), source, into)
        self._prompts = heads._replace(cache=cache)

    def copy(self, source: Int[np.ndarray, " P"], into: Int[np.ndarray, " P"]) -> None:
        """Copies prompts of groups into others; no `into` beyond G counts."""
        programs, old = self._programs, self._prompts
        cache = [programs.copy_layer(kv, source, into) for kv in old.cache]
        heads = programs.copy_groups(old._replace(cache=[]), source, into)
        self._prompts = heads._replace(cache=cache)

    def start(self, *starts: np.ndarray) -> None:
        """Starts completions; arguments as in `sampling.decode.start_rows`, from `key` on."""
        rows = self._programs.start_rows(self._decoding.rows, *starts)
        self._decoding = self._decoding._replace(rows=rows)

    def end(self, rows: Bool[np.ndarray, "G w"]) -> None:
        """Ends the completions of some rows."""
        ended = self._programs.end_rows(self._decoding.rows, rows)
        self._decoding = self._decoding._replace(rows=ended)

    def move(self, old: Shape, move: Move) -> None:
        """Goes over from the shape `old` to that of the move."""
        programs, new = self._programs, move.shape
        groups, rows = np.array(move.groups, np.int32), np.array(move.rows, np.int32)
        if (old.groups, old.prompt_slots) != (new.groups, new.prompt_slots):
            cache = list(self._prompts.cache)
            self._prompts = self._prompts._replace(cache=[])
            for i, kv in enumerate(cache):  # Each layer's old cache goes as its new one comes.
                cache[i] = programs.take_prompts(kv, groups, new.prompt_slots)
            heads = programs.take_groups(self._prompts, groups)
            self._prompts = heads._replace(cache=cache)
        if (old.groups, old.width) != (new.groups, new.width):
            taken = programs.take_rows(self._decoding.rows, rows)
            self._decoding = self._decoding._replace(rows=taken)
        if old._replace(prompt_slots=0) != new._replace(prompt_slots=0):
            ring = list(self._decoding.cache)
            self._decoding = self._decoding._replace(cache=[])
            for i, kv in enumerate(ring):
                ring[i] = programs.take_ring(kv, rows, self._decoding.head, new.ring_slots)
            head = np.int32(device.turned_head(old.ring_slots, new.ring_slots))
            head = jax.device_put(head, replicated(programs.mesh))
            self._decoding = self._decoding._replace(cache=ring, head=head)

    def decode(self, params: Params, steps: int, floor: int) -> device.Chunk:
        """Orders up to `steps` decoding steps, none once at most `floor` rows are active."""
        self._decoding, chunk = self._programs.decode(
            *self._model,
            self._rules,
            steps,
            params,
            self._prompts,
            self._decoding,
            np.int32(floor),
        )
        return chunk
