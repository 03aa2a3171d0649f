"""Hugging Face folders in and out: config.json to DecoderConfig, safetensors to params.

One table maps every parameter to its Hugging Face key; a tensor that is unknown, missing, doubled
or misshapen is an error that names it. Only safetensors are read: no pickle, no remote code.
"""

import json
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives numpy the name "bfloat16", which safetensors needs)
import numpy as np

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import DecoderConfig, abstract_params
from cipo_jax.typing import Params

MAX_SHARD_BYTES = 5 * 10**9
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# Fields that may stand in a config.json without changing a number that we compute.
_HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings",
    "initializer_range", "attention_dropout", "pretraining_tp", "_name_or_path",
    "hidden_dropout", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
    "is_encoder_decoder", "problem_type", "id2label", "label2id", "max_window_layers",
    "chunk_size_feed_forward", "_attn_implementation_autoset",
}  # fmt: skip
_READ = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_theta", "rope_parameters", "rope_scaling",
    "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act",
    "sliding_window", "use_sliding_window", "layer_types",
}  # fmt: skip


def resolve(path: str) -> Path:
    """A path, or "asset:NAME" for one inside the package."""
    if path.startswith("asset:"):
        return Path(str(resources.files("cipo_jax"))) / "assets" / path.removeprefix("asset:")
    return Path(path).expanduser()


def read_config(folder: str | Path) -> DecoderConfig:
    """Reads a model's shape from its config.json.

    Raises:
      UserError: where the file is not there, the architecture is not supported, or a field that
        changes the numbers is not understood.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; config.model.path must be a Hugging Face folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    try:
        return decoder_config(fields)
    except KeyError as error:
        raise UserError(f"{path}: field {error} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: a field is not of the type it should be: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def decoder_config(fields: dict[str, Any]) -> DecoderConfig:
    """A model's shape from the fields of a config.json; see `read_config`."""
    names = fields.get("architectures") or ["(none)"]
    family = _ARCHITECTURES.get(names[0])
    if family is None:
        raise UserError(
            f"field 'architectures': {names[0]} is not supported; supported are "
            f"{', '.join(_ARCHITECTURES)}"
        )
    for name, value in fields.items():
        if name not in _HARMLESS | _READ and value is not None and value is not False:
            raise UserError(f"field {name!r} = {value!r} is not understood; it may change results")
    if fields.get("model_type", family) != family:
        raise UserError(
            f"field 'model_type' = {fields['model_type']!r} does not go with {names[0]}; it should "
            f"be {family!r}"
        )
    both = [dict(fields.get(name) or {}) for name in ("rope_parameters", "rope_scaling")]
    if all(both) and both[0] != both[1]:
        raise UserError(
            f"fields 'rope_parameters' = {both[0]} and 'rope_scaling' = {both[1]} differ; keep one"
        )
    rope = both[0] or both[1]
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = rope.pop("rope_theta", fields.get("rope_theta", 10000.0))
    if kind != "default":
        raise UserError(f"field 'rope_parameters': rope type {kind!r} is not supported yet")
    if fields.get("hidden_act", "silu") != "silu":
        raise UserError(f"field 'hidden_act' = {fields['hidden_act']!r}: only 'silu' is supported")
    slides = family == "llama" and fields.get("sliding_window")
    if slides or fields.get("use_sliding_window"):
        raise UserError("field 'sliding_window': sliding windows are not supported yet")
    if any(kind != "full_attention" for kind in fields.get("layer_types") or ()):
        raise UserError("field 'layer_types': only 'full_attention' is supported yet")
    if fields.get("mlp_bias") or (fields.get("attention_bias") and family != "qwen2"):
        raise UserError("field 'attention_bias' or 'mlp_bias': biases there are not supported yet")
    heads = int(fields["num_attention_heads"])
    return DecoderConfig(
        vocab_size=int(fields["vocab_size"]),
        d_model=int(fields["hidden_size"]),
        d_ff=int(fields["intermediate_size"]),
        layers=int(fields["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(fields.get("num_key_value_heads") or heads),
        head_dim=int(fields.get("head_dim") or _default_head_dim(family, fields)),
        rope_theta=float(theta),
        norm_eps=float(fields["rms_norm_eps"]),
        tied_head=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def _default_head_dim(family: str, fields: dict[str, Any]) -> int:
    return 128 if family == "qwen3" else fields["hidden_size"] // fields["num_attention_heads"]


def config_json(config: DecoderConfig, max_positions: int = 2048) -> dict[str, Any]:
    """The config.json of a model that did not come from one (the tiny one)."""
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    return {
        "architectures": [next(k for k, v in _ARCHITECTURES.items() if v == family)],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": max_positions,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


class _Key(NamedTuple):
    """How one parameter of a layer (or of the top level) is stored by Hugging Face."""

    path: tuple[str, ...]
    name: str
    transposed: bool  # stored [out, in] where ours is [in, out]


def _keys(config: DecoderConfig) -> Iterator[_Key]:
    yield _Key(("embed",), "model.embed_tokens.weight", False)
    yield _Key(("final_norm", "scale"), "model.norm.weight", False)
    if not config.tied_head:
        yield _Key(("head",), "lm_head.weight", True)
    layer = ("layers", "block")
    at = "model.layers.{i}."
    yield _Key((*layer, "attn_norm", "scale"), at + "input_layernorm.weight", False)
    yield _Key((*layer, "mlp_norm", "scale"), at + "post_attention_layernorm.weight", False)
    for ours in "qkvo":
        name = f"{at}self_attn.{ours}_proj."
        yield _Key((*layer, ours, "kernel"), name + "weight", True)
        if config.qkv_bias and ours != "o":
            yield _Key((*layer, ours, "bias"), name + "bias", False)
    if config.qk_norm:
        yield _Key((*layer, "q_norm", "scale"), at + "self_attn.q_norm.weight", False)
        yield _Key((*layer, "k_norm", "scale"), at + "self_attn.k_norm.weight", False)
    for ours in ("gate", "up", "down"):
        yield _Key((*layer, ours, "kernel"), f"{at}mlp.{ours}_proj.weight", True)


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _to_stored(key: _Key, x: np.ndarray) -> np.ndarray:
    """Our array (without its layer axis) -> the two- or one-dimensional array that is stored."""
    if not key.transposed:
        return x.reshape(-1) if key.path[-1] == "bias" else x
    rows = x.reshape(-1, x.shape[-1]) if key.path[-2:-1] == ("o",) else x.reshape(x.shape[0], -1)
    return rows.T


def _from_stored(key: _Key, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return (x.T if key.transposed else x).reshape(shape)


def _stored_shape(key: _Key, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_stored(key, np.broadcast_to(np.float32(0), shape)).shape


class _Files:
    """The tensors of a folder's safetensors files, by name."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            other = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
            hint = f"; {other[0]} is pickled and is never read" if other else ""
            raise UserError(f"{folder}: holds no .safetensors file{hint}")
        self.where: dict[str, Any] = {}
        self.files: dict[str, Path] = {}
        for path in paths:
            try:
                handle = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error})") from None
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                if name in self.where:
                    raise UserError(f"{path}: tensor {name} is in {self.files[name].name} too")
                self.where[name], self.files[name] = handle, path

    def take(self, name: str, shape: tuple[int, ...], folder: Path) -> np.ndarray:
        if name not in self.where:
            raise UserError(f"{folder}: tensor {name} is missing from its safetensors files")
        handle = self.where.pop(name)
        found = tuple(handle.get_slice(name).get_shape())
        if found != shape:
            raise UserError(
                f"{self.files[name]}: tensor {name} has shape {found}, config.json says {shape}"
            )
        return handle.get_tensor(name)


def load_params(folder: str | Path, config: DecoderConfig, shardings: Params = None) -> Params:
    """Reads a folder's weights into the training layout, in float32.

    Args:
      folder: a Hugging Face folder with safetensors.
      config: its shape, from `read_config`.
      shardings: tree of shardings that the result is placed by; None for the default device.

    Raises:
      UserError: naming file and tensor, where a tensor is unknown, missing, doubled or misshapen.
    """
    folder = Path(folder)
    files, abstract = _Files(folder), abstract_params(config)
    params: dict[str, Any] = {}
    for key in _keys(config):
        shape = _get(abstract, key.path).shape
        if "{i}" in key.name:
            value = np.empty(shape, np.float32)
            stored = _stored_shape(key, shape[1:])
            for i in range(config.layers):
                x = files.take(key.name.format(i=i), stored, folder)
                value[i] = _from_stored(key, x, shape[1:])
        else:
            x = files.take(key.name, _stored_shape(key, shape), folder)
            value = _from_stored(key, x, shape).astype(np.float32)
        sharding = None if shardings is None else _get(shardings, key.path)
        _set(params, key.path, jax.device_put(value, sharding))
    # Files of tied models often repeat the embedding as a head.
    left = set(files.where) - ({"lm_head.weight"} if config.tied_head else set())
    left = {name for name in left if not name.endswith("rotary_emb.inv_freq")}
    if left:
        name = sorted(left)[0]
        raise UserError(f"{files.files[name]}: tensor {name} is not one that this model has")
    return params


def stored_tensors(config: DecoderConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name; one parameter at a time is on the host."""
    for key in _keys(config):
        value = np.asarray(_get(params, key.path))
        if "{i}" in key.name:
            for i in range(config.layers):
                yield key.name.format(i=i), _to_stored(key, value[i])
        else:
            yield key.name, _to_stored(key, value)


def save_folder(
    folder: str | Path,
    config: DecoderConfig,
    params: Params,
    tokenizer: Any,
    fields: dict[str, Any] | None = None,
    dtype: str = "float32",
) -> None:
    """Writes a Hugging Face folder (config, safetensors, tokenizer) whole or not at all.

    Args:
      folder: where to; an older export there is replaced.
      config: the model's shape.
      params: training layout.
      tokenizer: a Hugging Face tokenizer.
      fields: config.json of the model that this one was made from; None writes our own.
      dtype: of the stored weights.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fields = dict(fields if fields is not None else config_json(config))
        fields.pop("torch_dtype", None)
        fields["dtype"] = dtype
        (temporary / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {k: fields[k] for k in ids if fields.get(k) is not None}
        text = json.dumps(generation, indent=2) + "\n"
        (temporary / "generation_config.json").write_text(text)
        tokenizer.save_pretrained(temporary)
        _save_weights(temporary, config, params, dtype)
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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


def _save_weights(folder: Path, config: DecoderConfig, params: Params, dtype: str) -> None:
    """Writes model.safetensors, or shards of at most MAX_SHARD_BYTES and their index."""
    from safetensors.numpy import save_file

    paths: list[Path] = []
    shard: dict[str, np.ndarray] = {}
    shard_of: dict[str, int] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        paths.append(folder / f"part-{len(paths)}.safetensors")
        save_file(shard, paths[-1], metadata={"format": "pt"})
        paths[-1].chmod(0o644)  # The library makes it readable for its owner alone.
        shard, size = {}, 0

    for name, value in stored_tensors(config, params):
        value = np.ascontiguousarray(value.astype(jnp.dtype(dtype)))
        if shard and size + value.nbytes > MAX_SHARD_BYTES:
            flush()
        shard[name] = value
        shard_of[name] = len(paths)
        size, total = size + value.nbytes, total + value.nbytes
    flush()
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


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer; code that came with it is never run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its tokenizer cannot be read: {error}") from None
