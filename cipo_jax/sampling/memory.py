"""How many rows fit: the sampler's memory, computed from shapes before anything is allocated."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params, decoding_layout
from cipo_jax.sampling.scheduler import PREFILL_TOKENS, prompt_bucket
from cipo_jax.training.mesh import decoding_shardings, make_mesh
from cipo_jax.typing import Params

_MAX_ROWS = {"cpu": 64}  # With more, another row takes as long as it saves.
_MAX_ROWS_ELSEWHERE = 256
_MARGIN = 0.9  # share of the free memory that a plan may use
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The sampler's memory on one device, in bytes.

    Attributes:
      batch_size: completions decoded at a time.
      weights: in the decoding layout.
      cache: keys and values of prompts and responses, all at their greatest length, and one
        layer's a second time, for the moment in which a ring grows.
      work: logits of a step and arrays like them, or prompts during their prefill.
      resident: everything else on the device, such as the weights in the training layout.
      free: free memory before any of these.
    """

    batch_size: int
    weights: int
    cache: int
    work: int
    resident: int
    free: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work + self.resident

    @property
    def fits(self) -> bool:
        return self.total <= _MARGIN * self.free

    def __str__(self) -> str:
        def gib(size: int) -> str:
            return f"{size / _GIB:.2f}"

        return (
            f"{self.batch_size} rows: {gib(self.total)} GiB a device (weights {gib(self.weights)}, "
            f"cache {gib(self.cache)}, work {gib(self.work)}, resident {gib(self.resident)}) of "
            f"{gib(self.free)} GiB free"
        )


def free_bytes(device: Any) -> int:
    """Free memory of a device; for a CPU the memory of the machine or container, per device."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        whole = min(whole, int(text))
    return whole // jax.local_device_count(backend="cpu")


def _least_free_bytes(mesh: Mesh) -> int:
    """The minimum over all processes, so that all make the same plan."""
    free = free_bytes(mesh.local_devices[0])
    if jax.process_count() == 1:
        return free
    from jax.experimental import multihost_utils

    # In MiB, since integers of JAX have 32 bits.
    return int(multihost_utils.process_allgather(np.int32(free >> 20)).min()) << 20


def sharded_bytes(abstract: Params, shardings: Params) -> int:
    """Bytes that one device holds of a tree of shapes under its shardings."""
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, abstract, shardings
    )
    return sum(jax.tree.leaves(sizes))


def plan_memory(
    config: DecoderConfig,
    compute: Compute,
    mesh: Mesh,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    int8_cache: bool = False,
    resident: int = 0,
    free: int | None = None,
) -> MemoryPlan:
    """The memory that a batch size needs.

    Args:
      config: the model's shape.
      compute: dtype of decoding.
      mesh: rows lie over data x fsdp, heads and weights over tensor.
      batch_size: completions decoded at a time.
      prompt_tokens: of the longest prompt.
      new_tokens: of the longest completion.
      int8_cache: whether keys and values are int8.
      resident: bytes of everything else on a device.
      free: bytes of a device's free memory; None to ask the device.
    """
    layout = jax.eval_shape(
        lambda p: decoding_layout(config, p, compute.dtype), abstract_params(config)
    )
    shards, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    width = jax.numpy.dtype(compute.dtype).itemsize
    vector = config.head_dim + 4 if int8_cache else config.head_dim * width
    slots = prompt_bucket(prompt_tokens) + -(-new_tokens // 16) * 16
    local_rows = -(-batch_size // shards)
    layer = local_rows * slots * 2 * -(-config.kv_heads // tensor) * vector
    # Logits, their copies with tokens masked out, and the random numbers, in float32.
    logits = local_rows * -(-config.vocab_size // tensor) * 4 * 4
    # A prefill batch: keys and values, the widest activations, and attention scores.
    length = prompt_bucket(prompt_tokens)
    prompts = max(min(local_rows, PREFILL_TOKENS // length), 1)
    scores = 0 if compute.attention == "cudnn" else config.heads // tensor * length * 4
    wide = (4 * config.d_model + 3 * config.d_ff // tensor) * width
    kept = config.layers * 2 * -(-config.kv_heads // tensor) * vector
    prefill = prompts * length * (scores + wide + kept)
    return MemoryPlan(
        batch_size=batch_size,
        weights=sharded_bytes(layout, decoding_shardings(layout, mesh)),
        cache=layer * (config.layers + 1),
        work=max(logits, prefill),
        resident=resident,
        free=_least_free_bytes(mesh) if free is None else free,
    )


def fit_batch_size(
    name: str,
    max_batch_size: int,
    config: DecoderConfig,
    compute: Compute,
    mesh: Mesh,
    prompt_tokens: int,
    new_tokens: int,
    **more: Any,
) -> MemoryPlan:
    """The plan of a batch size; for 0, of the largest that fits, at most 64 on a CPU, else 256.

    Args:
      name: of the setting and its value, for the message.
      max_batch_size: 0 to choose.
      config: as in `plan_memory`, like all the others.
      compute: dtype of decoding.
      mesh: of the sampler.
      prompt_tokens: of the longest prompt.
      new_tokens: of the longest completion.
      **more: keyword arguments of `plan_memory`.

    Raises:
      UserError: it does not fit; the message names changes with which it would.
    """

    def plan(size: int, **other: Any) -> MemoryPlan:
        return plan_memory(config, compute, mesh, size, prompt_tokens, new_tokens, **(more | other))

    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    most = _MAX_ROWS.get(mesh.devices.flat[0].platform, _MAX_ROWS_ELSEWHERE)
    sizes = [2**i * shards for i in range(20) if 2**i * shards <= max(most, shards)]
    wanted = plan(max_batch_size or sizes[0])
    if wanted.fits:
        fitting = (p for p in map(plan, sizes) if p.fits)
        return wanted if max_batch_size else max(fitting, key=lambda p: p.batch_size)
    wanted_size = wanted.batch_size
    smaller = (p for p in map(plan, reversed(sizes)) if p.fits and p.batch_size < wanted_size)
    ways = [f"{p.batch_size} rows" for p in smaller][:1]
    if not more.get("int8_cache") and plan(wanted_size, int8_cache=True).fits:
        ways.append("config.sampling.int8_cache")
    for tensor in _larger_tensor_axes(mesh, config.kv_heads):
        other = make_mesh(-1, 1, tensor, devices=list(mesh.devices.flat))
        if plan_memory(config, compute, other, wanted_size, prompt_tokens, new_tokens, **more).fits:
            ways.append(f"config.mesh.tensor = {tensor}")
            break
    half = new_tokens // 2
    if half and plan_memory(config, compute, mesh, wanted_size, prompt_tokens, half, **more).fits:
        ways.append(f"{half} new tokens")
    raise UserError(
        f"{name} does not fit: {wanted}; would fit: {' or '.join(ways) or 'larger devices'}"
    )


def _larger_tensor_axes(mesh: Mesh, kv_heads: int) -> list[int]:
    """Sizes of the tensor axis, above the present one, that divide the devices and the heads."""
    most = math.gcd(mesh.devices.size, kv_heads)
    return [t for t in range(mesh.shape["tensor"] + 1, most + 1) if most % t == 0]
