"""Parameters to safetensors files, and to whole Hugging Face folders."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  (gives numpy the name "bfloat16", which safetensors needs)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cipo_jax.files import atomic_directory
from cipo_jax.models.decoder import DecoderConfig
from cipo_jax.models.hf_config import config_json
from cipo_jax.models.hf_fields import Fields
from cipo_jax.models.tensor_names import Key, get, keys, to_stored
from cipo_jax.typing import Array, Params, Tokenizer

MAX_SHARD_BYTES = 5 * 10**9


@functools.lru_cache(maxsize=256)
def _taker(key: Key, dtype: str) -> Callable[..., Array]:
    """A function from our parameter, or one layer of its stack, to the stored tensor."""

    def take(x: Array, i: Array | None = None) -> Array:
        if i is not None:
            x = jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
        x = x.reshape(-1) if key.path[-1] == "bias" else x
        return to_stored(key.inputs, x).astype(dtype)

    return take


def stored_tensors(
    table: Iterable[Key], tree: Params, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a key table with its Hugging Face name; the host holds one at a time.

    Where the tree is sharded over several processes, all of them must run this together.
    """
    for key in table:
        value = get(tree, key.path)
        # Gathered onto each device, so that every host can read it.
        replicated = (
            NamedSharding(value.sharding.mesh, PartitionSpec())
            if isinstance(getattr(value, "sharding", None), NamedSharding)
            else None
        )
        take = jax.jit(_taker(key, dtype), out_shardings=replicated)
        if key.stacked:
            for i in range(value.shape[0]):
                yield key.name.format(i=i), np.asarray(take(value, i))
        else:
            yield key.name, np.asarray(take(value))


def save_folder(
    folder: str | Path,
    config: DecoderConfig,
    params: Params,
    tokenizer: Tokenizer,
    fields: Fields | None = None,
    dtype: str = "float32",
    generation: Fields | None = None,
) -> None:
    """Writes a Hugging Face folder (config, safetensors, tokenizer) atomically.

    Args:
      folder: path to write to; an existing folder is replaced.
      config: architecture of the model.
      params: training layout, without adapters.
      tokenizer: a Hugging Face tokenizer.
      fields: config.json of the model that this one was made from; None for `config_json`.
      dtype: of the stored weights.
      generation: its generation_config.json; None for one with the special ids alone.
    """
    fields = dict(fields if fields is not None else config_json(config))
    fields.pop("torch_dtype", None)
    fields["dtype"] = dtype
    if generation is None:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {k: fields[k] for k in ids if fields.get(k) is not None}
    with atomic_directory(folder) as temporary:
        if temporary is not None:
            for name, values in (("config.json", fields), ("generation_config.json", generation)):
                text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
                (temporary / name).write_text(text, encoding="utf-8")
            tokenizer.save_pretrained(temporary)
        _save_weights(temporary, stored_tensors(keys(config), params, dtype))


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file that every user may read."""
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # The library makes it readable by its owner alone.


def _save_weights(folder: Path | None, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes model.safetensors, or shards of at most MAX_SHARD_BYTES and their index.

    With None for a folder (on processes that do not write) the tensors are only iterated over.
    """
    paths: list[Path] = []
    shard: dict[str, np.ndarray] = {}
    shard_of: dict[str, int] = {}
    size = total = 0

    def flush(folder: Path) -> None:
        nonlocal shard, size
        paths.append(folder / f"part-{len(paths)}.safetensors")
        save_tensors(paths[-1], shard)
        shard, size = {}, 0

    for name, value in tensors:
        if folder is None:
            continue
        if shard and size + value.nbytes > MAX_SHARD_BYTES:
            flush(folder)
        shard[name] = np.ascontiguousarray(value)
        shard_of[name] = len(paths)
        size, total = size + value.nbytes, total + value.nbytes
    if folder is None:
        return
    flush(folder)
    if len(paths) == 1:
        paths[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(paths):05d}.safetensors" for i in range(len(paths))]
    for path, name in zip(paths, names, strict=True):
        path.rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[i] for name, i in shard_of.items()},
    }
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)
