"""Safetensors to sharded parameters and back, under the names that Hugging Face gives the tensors.

One table maps every parameter to its key; a tensor that is unknown, missing, doubled or misshapen
is an error that names it. Files are memory-mapped and read slice by slice: each process takes what
its devices own, a tensor at a time, and the devices transpose, cast and stack. Only safetensors are
read: no pickle, no remote code.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives numpy the name "bfloat16", which safetensors needs)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import DecoderConfig, abstract_params
from cipo_jax.models.hf_config import Fields, config_json
from cipo_jax.typing import Array, Params

MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Key(NamedTuple):
    """How a parameter is stored by Hugging Face.

    Attributes:
      path: in our tree.
      name: of the tensor; "{i}" stands for the layer of a stacked parameter.
      inputs: how many axes of ours are summed over; they are stored last, as one axis, and the
        others first, as one. 0 for tensors that are stored as they are, or flat (biases, scales).
    """

    path: tuple[str, ...]
    name: str
    inputs: int = 0

    @property
    def stacked(self) -> bool:
        return "{i}" in self.name


PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def keys(config: DecoderConfig) -> Iterator[Key]:
    """The table: every parameter of a model and the tensor that holds it."""
    yield Key(("embed",), "model.embed_tokens.weight")
    yield Key(("final_norm", "scale"), "model.norm.weight")
    if not config.tied_head:
        yield Key(("head",), "lm_head.weight", 1)
    layer, at = ("layers", "block"), "model.layers.{i}."
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norm:
        norms = {
            "attn_norm": "post_attention_layernorm",
            "mlp_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm != "none":
        norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    for ours, theirs in norms.items():
        yield Key((*layer, ours, "scale"), f"{at}{theirs}.weight")
    for ours, theirs in PROJECTIONS.items():
        yield Key((*layer, ours, "kernel"), f"{at}{theirs}.weight", 2 if ours == "o" else 1)
        if has_bias(config, ours):
            yield Key((*layer, ours, "bias"), f"{at}{theirs}.bias")


def has_bias(config: DecoderConfig, projection: str) -> bool:
    """Whether a projection (by our name) has a bias."""
    if projection in ("q", "k", "v"):
        return config.qkv_bias
    return config.o_bias if projection == "o" else config.mlp_bias


def get(tree: Any, path: tuple[str, ...]) -> Any:
    """What stands at a path of a nested dict."""
    for part in path:
        tree = tree[part]
    return tree


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Sets what stands at a path of a nested dict."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _to_stored(inputs: int, x: Array) -> Array:
    """Our array (without its layer axis) -> the one- or two-dimensional one that is stored."""
    if not inputs:
        return x
    rows = 1
    for size in x.shape[:inputs]:
        rows *= size
    return x.reshape(rows, -1).T


def _stored_shape(key: Key, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a bias all axes are stored as one."""
    if key.path[-1] == "bias":
        return (int(np.prod(shape)),)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(functools.partial(_to_stored, key.inputs), x).shape


def _stored_sharding(key: Key, sharding: Sharding) -> Sharding:
    """The sharding of a stored tensor whose slices are those that end up where `sharding` says."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = tuple(sharding.spec)[1:] if key.stacked else tuple(sharding.spec)
    if key.path[-1] == "bias":
        return NamedSharding(sharding.mesh, PartitionSpec(*spec[:1]))
    if key.inputs:
        # Only the first of the axes that are stored as one is ever sharded.
        spec = (spec[key.inputs] if key.inputs < len(spec) else None, spec[0] if spec else None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


class _Files:
    """The tensors of a folder's safetensors files, by name. Reads nothing but headers by itself."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        # Mistral's folders hold the same weights once more under this name, in another layout.
        paths = sorted(
            p for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated")
        )
        if not paths:
            raise UserError(f"{folder}: holds no .safetensors file{_pickle_hint(folder)}")
        _check_index(folder, {p.name for p in paths})
        self._folder = folder
        self._handles: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error})") from None
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                if name in self._handles:
                    raise UserError(f"{path}: tensor {name} is in {self._paths[name].name} too")
                self._handles[name], self._paths[name] = handle, path

    def read(self, name: str, shape: tuple[int, ...], sharding: Sharding) -> Array:
        """Takes a tensor out, onto the devices, in its stored dtype; raises UserError."""
        if name not in self._handles:
            raise UserError(f"{self._folder}: tensor {name} is missing from its safetensors files")
        path = self._paths[name]
        stored = self._handles.pop(name).get_slice(name)
        found = tuple(stored.get_shape())
        if found != shape:
            raise UserError(f"{path}: tensor {name} has shape {found}, config.json says {shape}")
        if stored.get_dtype() not in _DTYPES:
            raise UserError(
                f"{path}: tensor {name} is stored as {stored.get_dtype()}; only "
                f"{', '.join(_DTYPES)} can be read"
            )

        @functools.cache
        def part(bounds: tuple[tuple[int | None, int | None], ...]) -> np.ndarray:
            # Devices that hold the same slice share one reading of it.
            return stored[tuple(slice(*b) for b in bounds)]

        def slices(index: Any) -> np.ndarray:
            return part(tuple((s.start, s.stop) for s in index))

        return jax.make_array_from_callback(shape, sharding, slices)

    def left(self) -> dict[str, Path]:
        """The tensors that nobody took, and their files."""
        return {name: self._paths[name] for name in self._handles}


def _check_index(folder: Path, there: set[str]) -> None:
    """Raises UserError where the folder's index names a file that is not there."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    try:
        where = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not an index of safetensors files") from None
    for tensor, file in where.items():
        if file not in there:
            raise UserError(
                f"{folder / file}: missing; {path.name} says that tensor {tensor} is in it"
            )


def _pickle_hint(folder: Path) -> str:
    pickled = sorted(
        p.name for end in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for p in folder.glob(end)
    )
    if not pickled:
        return ""
    return (
        f"; {pickled[0]} is pickled and is never read, since unpickling runs what code it holds: "
        "save the model again with safe_serialization=True"
    )


@functools.lru_cache(maxsize=256)
def _placer(
    key: Key, shape: tuple[int, ...], dtype: str, sharding: Sharding
) -> Callable[..., Array]:
    """A jitted function from a stored tensor to (its layer of) our parameter, on the devices."""
    one = shape[1:] if key.stacked else shape

    def ours(stored: Array) -> Array:
        return (stored.T if key.inputs else stored).reshape(one).astype(dtype)

    if not key.stacked:
        return jax.jit(ours, out_shardings=sharding)

    # Two programs: fused with the update, the transposing takes a third longer on a CPU.
    turn = jax.jit(ours, out_shardings=_without_layers(sharding))
    enter = jax.jit(
        lambda stack, x, i: jax.lax.dynamic_update_index_in_dim(stack, x, i, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
    return lambda stack, stored, i: enter(stack, turn(stored), i)


def _without_layers(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stacked parameter."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def load_params(
    folder: str | Path, config: DecoderConfig, shardings: Params = None, dtype: str = "float32"
) -> Params:
    """Reads a folder's weights into the training layout.

    Beside the result, the host holds one stored tensor at a time (of it, what its own devices own).

    Args:
      folder: a Hugging Face folder with safetensors.
      config: its shape, from `read_config`.
      shardings: tree of shardings that the result is placed by; None for the default device.
      dtype: of the parameters.

    Raises:
      UserError: naming file and tensor, where a tensor is unknown, missing, doubled or misshapen.
    """

    def may_be_left(name: str) -> bool:
        # Files of tied models often repeat the embedding as a head; old ones hold rope's series.
        repeated = config.tied_head and name == "lm_head.weight"
        return repeated or name.endswith("rotary_emb.inv_freq")

    abstract = abstract_params(config)
    return load_tree(folder, keys(config), abstract, shardings, dtype, may_be_left)


def load_tree(
    folder: str | Path,
    table: Iterable[Key],
    abstract: Params,
    shardings: Params,
    dtype: str,
    may_be_left: Callable[[str], bool] = lambda name: False,
) -> Params:
    """Reads the tensors of a table into a tree; see `load_params`, which gives the arguments."""
    files = _Files(Path(folder))
    here = SingleDeviceSharding(jax.devices()[0])
    tree: dict[str, Any] = {}
    for key in table:
        shape = get(abstract, key.path).shape
        sharding = here if shardings is None else get(shardings, key.path)
        stored_sharding = _stored_sharding(key, sharding)
        place = _placer(key, shape, dtype, sharding)
        if key.stacked:
            stored = _stored_shape(key, shape[1:])
            value = jnp.zeros(shape, dtype, device=sharding)
            for i in range(shape[0]):
                x = files.read(key.name.format(i=i), stored, stored_sharding)
                # Waiting keeps the host from reading ahead of the devices, into memory.
                value = jax.block_until_ready(place(value, x, i))
                del x
        else:
            x = files.read(key.name, _stored_shape(key, shape), stored_sharding)
            value = jax.block_until_ready(place(x))
            del x
        put(tree, key.path, value)
    for name, path in sorted(files.left().items()):
        if not may_be_left(name):
            raise UserError(f"{path}: tensor {name} is not one that this model has")
    return tree


@functools.lru_cache(maxsize=256)
def _taker(key: Key, dtype: str) -> Callable[..., Array]:
    """A jitted function from (a layer of) our parameter to the stored tensor."""

    def take(x: Array, i: Array | None = None) -> Array:
        if i is not None:
            x = jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
        x = x.reshape(-1) if key.path[-1] == "bias" else x
        return _to_stored(key.inputs, x).astype(dtype)

    return take


def stored_tensors(
    table: Iterable[Key], tree: Params, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a table under its Hugging Face name; one at a time is on the host.

    Where the tree lies on several processes, all must go through this together.
    """
    for key in table:
        value = get(tree, key.path)
        # A whole copy on each device lets every host read it, wherever its parts were.
        whole = (
            NamedSharding(value.sharding.mesh, PartitionSpec())
            if isinstance(getattr(value, "sharding", None), NamedSharding)
            else None
        )
        take = jax.jit(_taker(key, dtype), out_shardings=whole)
        if key.stacked:
            for i in range(value.shape[0]):
                yield key.name.format(i=i), np.asarray(take(value, i))
        else:
            yield key.name, np.asarray(take(value))


def save_folder(
    folder: str | Path,
    config: DecoderConfig,
    params: Params,
    tokenizer: Any,
    fields: Fields | None = None,
    dtype: str = "float32",
    generation: Fields | None = None,
) -> None:
    """Writes a Hugging Face folder (config, safetensors, tokenizer) whole or not at all.

    Args:
      folder: where to; an older export there is replaced.
      config: the model's shape.
      params: training layout, without adapters.
      tokenizer: a Hugging Face tokenizer.
      fields: config.json of the model that this one was made from; None writes our own.
      dtype: of the stored weights.
      generation: its generation_config.json; None writes one with the special ids alone.
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


@contextlib.contextmanager
def atomic_directory(folder: str | Path) -> Iterator[Path | None]:
    """A temporary folder that is renamed to `folder` when the block ends, or removed if it fails.

    Yields None on all processes but the first, which alone writes.
    """
    if jax.process_index():
        yield None
        _together(folder)
        return
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _together(folder)


def _together(folder: str | Path) -> None:
    """Lets no process go on before the folder is there."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"wrote {folder}")


def _replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`. What was there steps aside first, and comes back on failure."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file, readable for everyone whom the umask lets."""
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # The library makes it readable for its owner alone.


def _save_weights(folder: Path | None, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes model.safetensors, or shards of at most MAX_SHARD_BYTES and their index.

    Without a folder (on processes that do not write) the tensors are gone through all the same.
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
