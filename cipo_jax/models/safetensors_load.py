"""Safetensors files to sharded parameters.

A tensor that is unknown, missing, doubled or of another shape is an error that names it. Files are
memory-mapped and read slice by slice: each process reads the slices of its own devices, one tensor
at a time, and the devices transpose, cast and stack. Only safetensors are read: no pickled weights,
no remote code.
"""

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives numpy the name "bfloat16", which safetensors needs)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import DecoderConfig, abstract_params
from cipo_jax.models.tensor_names import Key, get, keys, put, stored_shape, stored_sharding
from cipo_jax.typing import Array, Params

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class _Files:
    """The tensors of a folder's safetensors files, by name; opening reads the headers alone."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        # Mistral's folders repeat the weights under this name, in another layout.
        paths = sorted(
            p for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated")
        )
        if not paths:
            raise UserError(f"{folder}: holds no .safetensors file{_pickle_hint(folder)}")
        _check_index(folder, {p.name for p in paths})
        self._folder = folder
        self._handles: dict[str, safe_open] = {}
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
        """Reads a tensor onto the devices, in its stored dtype, and marks it as read.

        Raises:
          UserError: where it is missing, or of another shape or dtype.
        """
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
            # Devices with the same slice share one read of it.
            return stored[tuple(slice(*b) for b in bounds)]

        def slices(index: tuple[slice, ...] | None) -> np.ndarray:
            return part(tuple((s.start, s.stop) for s in index or ()))

        return jax.make_array_from_callback(shape, sharding, slices)

    def unread(self) -> dict[str, Path]:
        """The tensors that were not read, and their files."""
        return {name: self._paths[name] for name in self._handles}


def _check_index(folder: Path, present: set[str]) -> None:
    """Raises UserError where the folder's index names a file that does not exist."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    try:
        where = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not an index of safetensors files") from None
    for tensor, file in where.items():
        if file not in present:
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
        f"; {pickled[0]} is pickled and is never read, since unpickling runs the code in it: "
        "save the model again with safe_serialization=True"
    )


@functools.lru_cache(maxsize=256)
def _placer(
    key: Key, shape: tuple[int, ...], dtype: str, sharding: Sharding
) -> Callable[..., Array]:
    """A jitted function from a stored tensor to our parameter, or to its layer of the stack."""
    layer_shape = shape[1:] if key.stacked else shape

    def ours(stored: Array) -> Array:
        return (stored.T if key.inputs else stored).reshape(layer_shape).astype(dtype)

    if not key.stacked:
        return jax.jit(ours, out_shardings=sharding)

    # Two programs: fused with the update, the transpose takes a third longer on a CPU.
    transpose = jax.jit(ours, out_shardings=_without_layers(sharding))
    insert = jax.jit(
        lambda stack, x, i: jax.lax.dynamic_update_index_in_dim(stack, x, i, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
    return lambda stack, stored, i: insert(stack, transpose(stored), i)


def _without_layers(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stacked parameter."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def load_params(
    folder: str | Path, config: DecoderConfig, shardings: Params = None, dtype: str = "float32"
) -> Params:
    """Reads a folder's weights into the training layout.

    Besides the result, a host holds one stored tensor at a time, and of it the parts of its own
    devices.

    Args:
      folder: a Hugging Face folder with safetensors.
      config: architecture of the model, from `read_config`.
      shardings: tree of shardings of the result; None for the default device.
      dtype: of the parameters.

    Raises:
      UserError: naming file and tensor, where a tensor is unknown, missing, doubled, or of another
        shape or dtype.
    """

    def may_be_unread(name: str) -> bool:
        # Files of tied models often repeat the embedding as a head; old ones store rope's
        # frequencies.
        repeated = config.tied_head and name == "lm_head.weight"
        return repeated or name.endswith("rotary_emb.inv_freq")

    abstract = abstract_params(config)
    return load_tree(folder, keys(config), abstract, shardings, dtype, may_be_unread)


def load_tree(
    folder: str | Path,
    table: Iterable[Key],
    abstract: Params,
    shardings: Params,
    dtype: str,
    may_be_unread: Callable[[str], bool] = lambda name: False,
) -> Params:
    """Reads the tensors of a key table into a tree; see `load_params`.

    Args:
      folder: that holds the safetensors files.
      table: the parameters and the tensors that store them.
      abstract: shapes of the parameters.
      shardings: as in `load_params`.
      dtype: of the parameters.
      may_be_unread: whether a tensor, by its name, may be missing from the table.
    """
    files = _Files(Path(folder))
    default = SingleDeviceSharding(jax.devices()[0])
    tree: Params = {}
    for key in table:
        shape = get(abstract, key.path).shape
        sharding = default if shardings is None else get(shardings, key.path)
        read_sharding = stored_sharding(key, sharding)
        place = _placer(key, shape, dtype, sharding)
        if key.stacked:
            stored = stored_shape(key, shape[1:])
            value = jnp.zeros(shape, dtype, device=sharding)
            for i in range(shape[0]):
                x = files.read(key.name.format(i=i), stored, read_sharding)
                # Waiting keeps the host from reading ahead, which would take memory.
                value = jax.block_until_ready(place(value, x, i))
                del x
        else:
            x = files.read(key.name, stored_shape(key, shape), read_sharding)
            value = jax.block_until_ready(place(x))
            del x
        put(tree, key.path, value)
    for name, path in sorted(files.unread().items()):
        if not may_be_unread(name):
            raise UserError(f"{path}: tensor {name} is not a tensor of this model")
    return tree
