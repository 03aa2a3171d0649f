"""config.json to DecoderConfig: which architectures there are, and what each field means to them.

A field that may change a number and is not understood here is an error that names it: a model whose
config is half-read gives plausible text and wrong logits.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import DecoderConfig, LayerKind
from cipo_jax.ops.rope import Rope

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Family:
    """An architecture of transformers.

    Attributes:
      model_type: as config.json names it.
      kinds: fields -> the kind of each layer.
      shape: what the architecture fixes of DecoderConfig.
      attention_bias: projections that the field `attention_bias` gives a bias; "" where there is no
        such field.
      reads_mlp_bias: whether the field `mlp_bias` means something.
      tied_head: where config.json does not say.
      rope_theta: where config.json does not say.
      head_dim: where config.json does not say; 0 for d_model / heads.
      kv_heads: where config.json does not say; 0 for as many as there are heads.
      reads: further fields that mean something.
    """

    model_type: str
    kinds: Callable[["_Family", Fields], tuple[LayerKind, ...]]
    shape: Fields = dataclasses.field(default_factory=dict)
    attention_bias: str = ""
    reads_mlp_bias: bool = False
    tied_head: bool = False
    rope_theta: float = 10000.0
    head_dim: int = 0
    kv_heads: int = 0
    reads: frozenset[str] = frozenset()


def _uniform(family: _Family, fields: Fields) -> tuple[LayerKind, ...]:
    """Full attention everywhere."""
    _only_full_attention(fields)
    return (LayerKind(_rope(family, fields)),)


def _mistral(family: _Family, fields: Fields) -> tuple[LayerKind, ...]:
    """One window for all layers."""
    _only_full_attention(fields)
    return (LayerKind(_rope(family, fields), _window(fields, 4096)),)


def _qwen(family: _Family, fields: Fields) -> tuple[LayerKind, ...]:
    """Windows from layer max_window_layers on, if they are switched on at all."""
    rope = _rope(family, fields)
    window = _window(fields, 4096) if _flag(fields, "use_sliding_window") else None
    # 0 is sensible here: every layer has a window.
    first = 0 if fields.get("max_window_layers") == 0 else _whole(fields, "max_window_layers", 28)
    types = fields.get("layer_types") or [
        "sliding_attention" if window and i >= first else "full_attention"
        for i in range(_layers(fields))
    ]
    slides = _slides(fields, types, window)
    return tuple(LayerKind(rope, window if s else None) for s in slides)


def _smollm3(family: _Family, fields: Fields) -> tuple[LayerKind, ...]:
    """Layers without position embedding, which alone may have a window."""
    rope, layers = _rope(family, fields), _layers(fields)
    every = _whole(fields, "no_rope_layer_interval", 4)
    rotated = fields.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(layers)]
    if len(rotated) < layers:
        raise UserError(
            f"field 'no_rope_layers' has {len(rotated)} entries, num_hidden_layers is {layers}"
        )
    window = _window(fields, None) if _flag(fields, "use_sliding_window") else None
    types = fields.get("layer_types") or [
        "full_attention" if rotates or not window else "sliding_attention"
        for rotates in rotated[:layers]
    ]
    return tuple(
        LayerKind(rope if rotates else None, window if slides else None)
        for rotates, slides in zip(rotated, _slides(fields, types, window), strict=False)
    )


def _olmo3(family: _Family, fields: Fields) -> tuple[LayerKind, ...]:
    """Three layers with a window, then one without; only the latter have a stretched rope."""
    window = _window(fields, 4096)
    types = fields.get("layer_types") or [
        "full_attention" if (i + 1) % 4 == 0 else "sliding_attention"
        for i in range(_layers(fields))
    ]
    given = fields.get("rope_parameters")
    full, sliding = "full_attention", "sliding_attention"
    if given:
        if not isinstance(given, dict) or not set(given) <= {full, sliding}:
            raise UserError(
                f"field 'rope_parameters' = {given!r}: must hold {full!r} and {sliding!r} here"
            )
        if fields.get("rope_scaling"):
            raise UserError("fields 'rope_parameters' and 'rope_scaling' are both there; keep one")
    else:
        given = {full: fields.get("rope_scaling")}
    # transformers gives sliding layers its own default theta, whatever the field rope_theta says.
    own = {k: v for k, v in fields.items() if k != "rope_theta"}
    stretched = LayerKind(_parse_rope(family, fields, given.get(full), "rope_parameters"))
    local = LayerKind(_parse_rope(family, own, given.get(sliding), "rope_parameters"), window)
    return tuple(local if slides else stretched for slides in _slides(fields, types, window))


_WINDOW_FIELDS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})
_OLMO = {"qk_norm": "all", "post_norm": True}
_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", _uniform, attention_bias="qkvo", reads_mlp_bias=True),
    "MistralForCausalLM": _Family(
        "mistral", _mistral, kv_heads=8, reads=frozenset({"sliding_window"})
    ),
    # Has its three biases whatever `attention_bias` says.
    "Qwen2ForCausalLM": _Family(
        "qwen2",
        _qwen,
        {"qkv_bias": True},
        kv_heads=32,
        reads=_WINDOW_FIELDS | {"attention_bias"},
    ),
    "Qwen3ForCausalLM": _Family(
        "qwen3",
        _qwen,
        {"qk_norm": "head"},
        attention_bias="qkvo",
        head_dim=128,
        kv_heads=32,
        reads=_WINDOW_FIELDS,
    ),
    "SmolLM3ForCausalLM": _Family(
        "smollm3",
        _smollm3,
        attention_bias="qkvo",
        reads_mlp_bias=True,
        tied_head=True,
        rope_theta=2000000.0,
        kv_heads=4,
        reads=_WINDOW_FIELDS | {"no_rope_layers", "no_rope_layer_interval"},
    ),
    "Olmo2ForCausalLM": _Family("olmo2", _uniform, _OLMO, attention_bias="qkvo"),
    "Olmo3ForCausalLM": _Family(
        "olmo3",
        _olmo3,
        _OLMO,
        attention_bias="qkvo",
        rope_theta=500000.0,
        reads=frozenset({"sliding_window"}),
    ),
}
SUPPORTED = tuple(_FAMILIES)

# Fields that may stand in a config.json without changing a number that we compute.
_HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout",
    "pretraining_tp", "_name_or_path", "hidden_dropout", "output_attentions",
    "output_hidden_states", "return_dict", "torchscript", "is_encoder_decoder", "problem_type",
    "id2label", "label2id", "chunk_size_feed_forward", "_attn_implementation_autoset",
    "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
_READ = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_theta", "rope_parameters", "rope_scaling",
    "rms_norm_eps", "tie_word_embeddings", "hidden_act", "layer_types", "max_position_embeddings",
}  # fmt: skip
# What Qwen2 writes of its windows stands in many configs that are not switched on.
_OFF = {"sliding_window", "max_window_layers", "use_sliding_window"}

_ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
        # In the config of DeepSeek-R1-0528-Qwen3-8B. transformers, which exports are opened with,
        # does not know it and goes on without; so do we. See docs/models.md.
        "attn_factor",
    },
}  # fmt: skip


def read_config(folder: str | Path) -> DecoderConfig:
    """Reads a model's shape from its config.json.

    Raises:
      UserError: where the file is not there, the architecture is not supported, or a field that
        changes the numbers is not understood.
    """
    path = Path(folder) / "config.json"
    try:
        return decoder_config(read_fields(folder))
    except KeyError as error:
        raise UserError(f"{path}: field {error} is missing") from None
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, IndexError) as error:
        raise UserError(f"{path}: a field is not of the type it should be: {error}") from None
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def read_fields(folder: str | Path) -> Fields:
    """The fields of a folder's config.json as they stand there."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; config.model.path must be a Hugging Face folder")
    return read_object(path)


def read_object(path: Path) -> Fields:
    """The JSON object that a file holds; raises UserError where it holds none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: not a JSON object")
    return fields


def decoder_config(fields: Fields) -> DecoderConfig:
    """A model's shape from the fields of a config.json; see `read_config`."""
    names = fields.get("architectures") or ["(none)"]
    family = _FAMILIES.get(names[0])
    if family is None:
        raise UserError(
            f"field 'architectures': {names[0]} is not supported; supported are "
            f"{', '.join(SUPPORTED)}"
        )
    _check_fields(family, fields)
    if fields.get("model_type", family.model_type) != family.model_type:
        raise UserError(
            f"field 'model_type' = {fields['model_type']!r} does not go with {names[0]}; it should "
            f"be {family.model_type!r}"
        )
    if fields.get("hidden_act", "silu") != "silu":
        raise UserError(f"field 'hidden_act' = {fields['hidden_act']!r}: only 'silu' is supported")
    d_model, heads = _whole(fields, "hidden_size"), _whole(fields, "num_attention_heads")
    kv_heads = _whole(fields, "num_key_value_heads", family.kv_heads or heads)
    head_dim = _whole(fields, "head_dim", family.head_dim or d_model // heads)
    if heads % kv_heads:
        raise UserError(
            f"field 'num_key_value_heads' = {kv_heads}: must divide num_attention_heads = {heads}"
        )
    if head_dim % 2:
        raise UserError(f"field 'head_dim' = {head_dim}: rotary embeddings need it to be even")
    biased = family.attention_bias if _flag(fields, "attention_bias") else ""
    shape: Fields = {"qkv_bias": "qkv" in biased, "o_bias": "o" in biased} | family.shape
    kinds = family.kinds(family, fields)
    return DecoderConfig(
        vocab_size=_whole(fields, "vocab_size"),
        d_model=d_model,
        d_ff=_whole(fields, "intermediate_size"),
        layers=_layers(fields),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_number(fields, "rms_norm_eps"),
        tied_head=_flag(fields, "tie_word_embeddings", family.tied_head),
        mlp_bias=_flag(fields, "mlp_bias"),
        layer_kinds=kinds[:1] if len(set(kinds)) == 1 else kinds,
        **shape,
    )


def _check_fields(family: _Family, fields: Fields) -> None:
    """Raises UserError at a field that may change results and is not understood."""
    if fields.get("auto_map"):
        raise UserError(
            "field 'auto_map': this model wants code from its own folder to be run, which is never "
            "done: code that comes with weights may do anything. Use a folder of one of the "
            "supported architectures without that field"
        )
    if fields.get("quantization_config"):
        raise UserError(
            "field 'quantization_config': quantized weights cannot be trained; use the folder of "
            "the model before its quantization"
        )
    known = _HARMLESS | _READ | family.reads
    known |= {"attention_bias"} if family.attention_bias else set()
    known |= {"mlp_bias"} if family.reads_mlp_bias else set()
    if not fields.get("use_sliding_window"):
        known |= _OFF - {"sliding_window"}
        if family.reads or fields.get("use_sliding_window") is False:
            known |= _OFF
    for name, value in fields.items():
        if name not in known and value is not None and value is not False:
            raise UserError(f"field {name!r} = {value!r} is not understood; it may change results")


def _whole(fields: Fields, name: str, default: int | None = None) -> int:
    """A field that is a whole number above 0; by default required."""
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if name not in fields:
        raise UserError(f"field {name!r} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"field {name!r} = {value!r}: must be a whole number above 0")
    return value


def _number(fields: Fields, name: str, where: str = "", default: float | None = None) -> float:
    """A field that is a number above 0; by default required."""
    value = fields.get(name)
    if value is None and default is not None:
        return default
    where = f"field {where!r}: {name!r}" if where else f"field {name!r}"
    if value is None:
        raise UserError(f"{where} is missing")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UserError(f"{where} = {value!r}: must be a number above 0")
    return float(value)


def _flag(fields: Fields, name: str, default: bool = False) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"field {name!r} = {value!r}: must be true or false")
    return default if value is None else value


def _layers(fields: Fields) -> int:
    return _whole(fields, "num_hidden_layers")


def _window(fields: Fields, default: int | None) -> int | None:
    """The window; null switches it off, a missing field is what transformers takes for it."""
    if fields.get("sliding_window", default) is None:
        return None
    return _whole(fields, "sliding_window", default)


def _slides(fields: Fields, types: list[str], window: int | None) -> list[bool]:
    """Whether each layer has a window, from its type's name."""
    if not isinstance(types, list) or len(types) != _layers(fields):
        raise UserError(
            f"field 'layer_types' = {types!r}: must have num_hidden_layers = {_layers(fields)} "
            "entries"
        )
    if "sliding_attention" in types and window is None:
        raise UserError("field 'layer_types' has sliding layers, but no window is switched on")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"field 'layer_types': {kind!r} is not supported")
    return [kind == "sliding_attention" for kind in types]


def _only_full_attention(fields: Fields) -> None:
    if fields.get("layer_types"):
        _slides(fields, fields["layer_types"], None)


def _rope(family: _Family, fields: Fields) -> Rope:
    """The rope of a config with one for all layers, in its new or in its old spelling."""
    both = [fields.get(name) for name in ("rope_parameters", "rope_scaling")]
    if all(both) and both[0] != both[1]:
        raise UserError(
            f"fields 'rope_parameters' = {both[0]} and 'rope_scaling' = {both[1]} differ; keep one"
        )
    name = "rope_parameters" if both[0] else "rope_scaling"
    return _parse_rope(family, fields, both[0] or both[1], name)


def _parse_rope(family: _Family, fields: Fields, given: Fields | None, name: str) -> Rope:
    if given is not None and not isinstance(given, dict):
        raise UserError(f"field {name!r} = {given!r}: must be an object")
    given = dict(given or {})
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)  # Old configs say it twice.
    theta = _number(fields, "rope_theta", default=family.rope_theta)
    theta = _number(given, "rope_theta", name, theta)
    given.pop("rope_theta", None)
    if kind not in _ROPE_FIELDS:
        raise UserError(
            f"field {name!r}: rope type {kind!r} is not supported; supported are "
            f"{', '.join(_ROPE_FIELDS)}"
        )
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if key not in _ROPE_FIELDS[kind]:
            raise UserError(
                f"field {name!r}: {key!r} = {value!r} is not understood for rope type {kind!r}; it "
                "may change results"
            )
    if kind == "default":
        return Rope(theta)
    longest = 0
    if kind in ("dynamic", "llama3", "yarn"):
        longest = _whole(fields, "max_position_embeddings")
    trained = _whole(given, "original_max_position_embeddings", longest)
    # Of yarn alone the factor may be left to the two lengths.
    factor = _number(given, "factor", name, longest / trained if kind == "yarn" else None)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    if kind == "dynamic":
        return Rope(theta, "dynamic", factor, longest)
    if kind == "llama3":
        low, high = (_number(given, f"{end}_freq_factor", name) for end in ("low", "high"))
        return Rope(theta, "llama3", factor, trained, low_freq_factor=low, high_freq_factor=high)
    return Rope(
        theta,
        "yarn",
        factor,
        trained,
        beta_fast=_number(given, "beta_fast", name, 32.0),
        beta_slow=_number(given, "beta_slow", name, 1.0),
        truncate=_flag(given, "truncate", True),
        scale=_yarn_scale(given, factor, name),
    )


def _yarn_scale(given: Fields, factor: float, name: str) -> float:
    """The temperature of yarn, as a factor on cosines and sines (arXiv 2309.00071, eq. 22)."""

    def mscale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return _number(given, "attention_factor", name)
    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(_number(given, "mscale", name)) / mscale(
            _number(given, "mscale_all_dim", name)
        )
    return mscale()


def config_json(config: DecoderConfig, max_positions: int = 2048) -> Fields:
    """The config.json of a model that did not come from one (the tiny one).

    Raises:
      ValueError: for a shape that is none of Llama, Qwen2 and Qwen3 with a plain rope.
    """
    name = {"head": "Qwen3ForCausalLM", "none": "LlamaForCausalLM"}.get(config.qk_norm, "")
    name = "Qwen2ForCausalLM" if config.qkv_bias and not config.o_bias else name
    rope = config.layer_kinds[0].rope
    fields = {
        "architectures": [name],
        "model_type": _FAMILIES[name].model_type if name else "",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta if rope else 1.0,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": max_positions,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if not name or decoder_config(fields) != config:
        raise ValueError(f"no config.json is known that means {config}")
    return fields
