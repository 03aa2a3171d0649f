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
from cipo_jax.sampling.schedule import PREFILL_TOKENS, prompt_bucket
from cipo_jax.training.mesh import decoding_shardings, make_mesh
from cipo_jax.typing import Params

_MOST_ROWS = {"cpu": 64}  # Beyond these another row takes as long as it saves.
_MOST_ROWS_ELSEWHERE = 256
_MARGIN = 0.9  # of the free memory that is planned with
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the sampler takes of a device's memory, in bytes.

    Attributes:
      rows: completions decoded at a time.
      weights: in the decoding layout.
      cache: keys and values of prompts and responses, all at their greatest length, and one
        layer's once more, for the time in which a ring grows.
      work: logits of a step and their like, and prompts while they are computed.
      resident: what lies there besides, such as the weights in the training layout.
      free: what there was to begin with.
    """

    rows: int
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
            f"{self.rows} rows: {gib(self.total)} GiB a device (weights {gib(self.weights)}, cache "
            f"{gib(self.cache)}, work {gib(self.work)}, besides {gib(self.resident)}) of "
            f"{gib(self.free)} GiB free"
        )


def free_bytes(device: Any) -> int:
    """Free memory of a device; of a CPU what the machine or its container has, for each device."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        whole = min(whole, int(text))
    return whole // jax.local_device_count(backend="cpu")


def _least_free_bytes(mesh: Mesh) -> int:
    """Of all processes, so that all make the same plan."""
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


def plan(
    config: DecoderConfig,
    compute: Compute,
    mesh: Mesh,
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    int8_cache: bool = False,
    resident: int = 0,
    free: int | None = None,
) -> Plan:
    """What so many rows take.

    Args:
      config: the model's shape.
      compute: dtype of decoding.
      mesh: rows lie over data x fsdp, heads and weights over tensor.
      rows: completions decoded at a time.
      prompt_tokens: of the longest prompt.
      new_tokens: of the longest completion.
      int8_cache: whether keys and values are kept as int8.
      resident: bytes that a device holds besides.
      free: bytes of a device's free memory; None to ask it.
    """
    layout = jax.eval_shape(
        lambda p: decoding_layout(config, p, compute.dtype), abstract_params(config)
    )
    shards, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    width = jax.numpy.dtype(compute.dtype).itemsize
    vector = config.head_dim + 4 if int8_cache else config.head_dim * width
    slots = prompt_bucket(prompt_tokens) + -(-new_tokens // 16) * 16
    here = -(-rows // shards)
    layer = here * slots * 2 * -(-config.kv_heads // tensor) * vector
    # Logits, what is left of them by the rules, and the noise, in float32.
    logits = here * -(-config.vocab_size // tensor) * 4 * 4
    # Prompts on their way into the cache: keys and values, the widest activations, and scores.
    length = prompt_bucket(prompt_tokens)
    prompts = max(min(here, PREFILL_TOKENS // length), 1)
    scores = 0 if compute.attention == "cudnn" else config.heads // tensor * length * 4
    wide = (4 * config.d_model + 3 * config.d_ff // tensor) * width
    kept = config.layers * 2 * -(-config.kv_heads // tensor) * vector
    prefill = prompts * length * (scores + wide + kept)
    return Plan(
        rows=rows,
        weights=sharded_bytes(layout, decoding_shardings(layout, mesh)),
        cache=layer * (config.layers + 1),
        work=max(logits, prefill),
        resident=resident,
        free=_least_free_bytes(mesh) if free is None else free,
    )


def fitting_rows(
    name: str,
    rows: int,
    config: DecoderConfig,
    compute: Compute,
    mesh: Mesh,
    prompt_tokens: int,
    new_tokens: int,
    **more: Any,
) -> Plan:
    """The plan of so many rows; where `rows` is 0, of as many as fit, at most 64 on a CPU and 256.

    Args:
      name: of the setting, for the message.
      rows: 0 to choose.
      config: as in `plan`, like all the others.
      compute: as in `plan`.
      mesh: as in `plan`.
      prompt_tokens: as in `plan`.
      new_tokens: as in `plan`.
      **more: as in `plan`.

    Raises:
      UserError: where they do not fit, with what would.
    """

    def of(rows: int, **other: Any) -> Plan:
        return plan(config, compute, mesh, rows, prompt_tokens, new_tokens, **(more | other))

    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    most = _MOST_ROWS.get(mesh.devices.flat[0].platform, _MOST_ROWS_ELSEWHERE)
    sizes = [2**i * shards for i in range(20) if 2**i * shards <= max(most, shards)]
    wanted = of(rows) if rows else of(sizes[0])
    if wanted.fits:
        return wanted if rows else max((p for p in map(of, sizes) if p.fits), key=lambda p: p.rows)
    ways = [f"{p.rows} rows" for p in map(of, reversed(sizes)) if p.fits and p.rows < wanted.rows]
    ways = ways[:1]
    if not more.get("int8_cache") and of(wanted.rows, int8_cache=True).fits:
        ways.append("config.sampling.int8_cache")
    for tensor in _wider(mesh, config.kv_heads):
        other = make_mesh(-1, 1, tensor, devices=list(mesh.devices.flat))
        if plan(config, compute, other, wanted.rows, prompt_tokens, new_tokens, **more).fits:
            ways.append(f"config.mesh.tensor = {tensor}")
            break
    half = new_tokens // 2
    if half and plan(config, compute, mesh, wanted.rows, prompt_tokens, half, **more).fits:
        ways.append(f"{half} new tokens")
    raise UserError(
        f"{name} does not fit: {wanted}; what would: {' or '.join(ways) or 'larger devices'}"
    )


def _wider(mesh: Mesh, kv_heads: int) -> list[int]:
    """Sizes of the tensor axis, above the present one, that devices and heads divide by."""
    most = math.gcd(mesh.devices.size, kv_heads)
    return [t for t in range(mesh.shape["tensor"] + 1, most + 1) if most % t == 0]
