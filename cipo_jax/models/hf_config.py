"""config.json to DecoderConfig: the supported architectures and the fields that each of them reads.

A field that is not understood and may change results is an error that names it: a model whose
config is half-read gives plausible text and wrong logits.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import DecoderConfig, LayerKind
from cipo_jax.models.hf_fields import Fields, boolean, positive_int, positive_number, read_fields
from cipo_jax.models.hf_rope import parse_rope, uniform_rope


@dataclasses.dataclass(frozen=True)
class _Family:
    """An architecture of transformers.

    Attributes:
      model_type: value of the field `model_type`.
      kinds: (family, fields) -> the kind of each layer.
      fixed: fields of DecoderConfig that the architecture fixes.
      attention_bias: projections that get a bias where the field `attention_bias` is true; "" where
        the architecture has no such field.
      reads_mlp_bias: whether the architecture has the field `mlp_bias`.
      tied_head: default of `tie_word_embeddings`.
      rope_theta: default of `rope_theta`.
      head_dim: default of `head_dim`; 0 for d_model / heads.
      kv_heads: default of `num_key_value_heads`; 0 for the number of heads.
      reads: further fields that the architecture has.
    """

    model_type: str
    kinds: Callable[["_Family", Fields], tuple[LayerKind, ...]]
    fixed: Fields = dataclasses.field(default_factory=dict)
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
    return (LayerKind(uniform_rope(fields, family.rope_theta)),)


def _mistral(family: _Family, fields: Fields) -> tuple[LayerKind, ...]:
    """One window for all layers."""
    _only_full_attention(fields)
    return (LayerKind(uniform_rope(fields, family.rope_theta), _window(fields, 4096)),)


def _qwen(family: _Family, fields: Fields) -> tuple[LayerKind, ...]:
    """Windows from layer max_window_layers on, where `use_sliding_window` is true."""
    rope = uniform_rope(fields, family.rope_theta)
    window = _window(fields, 4096) if boolean(fields, "use_sliding_window") else None
    # 0 is allowed: every layer has a window.
    first = (
        0 if fields.get("max_window_layers") == 0 else positive_int(fields, "max_window_layers", 28)
    )
    types = fields.get("layer_types") or [
        "sliding_attention" if window and i >= first else "full_attention"
        for i in range(_layers(fields))
    ]
    slides = _slides(fields, types, window)
    return tuple(LayerKind(rope, window if s else None) for s in slides)


def _smollm3(family: _Family, fields: Fields) -> tuple[LayerKind, ...]:
    """Some layers have no position embedding; only these may have a window."""
    rope, layers = uniform_rope(fields, family.rope_theta), _layers(fields)
    every = positive_int(fields, "no_rope_layer_interval", 4)
    rotated = fields.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(layers)]
    if len(rotated) < layers:
        raise UserError(
            f"field 'no_rope_layers' has {len(rotated)} entries, num_hidden_layers is {layers}"
        )
    window = _window(fields, None) if boolean(fields, "use_sliding_window") else None
    types = fields.get("layer_types") or [
        "full_attention" if rotates or not window else "sliding_attention"
        for rotates in rotated[:layers]
    ]
    return tuple(
        LayerKind(rope if rotates else None, window if slides else None)
        for rotates, slides in zip(rotated, _slides(fields, types, window), strict=False)
    )


def _olmo3(family: _Family, fields: Fields) -> tuple[LayerKind, ...]:
    """Three layers with a window, then one without, which alone has a scaled rope."""
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
    # In transformers the sliding layers use the default theta, not the field rope_theta.
    own = {k: v for k, v in fields.items() if k != "rope_theta"}
    name, theta = "rope_parameters", family.rope_theta
    scaled = LayerKind(parse_rope(fields, given.get(full), name, theta))
    local = LayerKind(parse_rope(own, given.get(sliding), name, theta), window)
    return tuple(local if slides else scaled for slides in _slides(fields, types, window))


_WINDOW_FIELDS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})
_OLMO = {"qk_norm": "all", "post_norm": True}
_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", _uniform, attention_bias="qkvo", reads_mlp_bias=True),
    "MistralForCausalLM": _Family(
        "mistral", _mistral, kv_heads=8, reads=frozenset({"sliding_window"})
    ),
    # Biases of q, k and v do not depend on `attention_bias`.
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

# Fields of a config.json that do not change any number that is computed here.
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
# Qwen2's window fields stand in many configs whose windows are switched off.
_OFF = {"sliding_window", "max_window_layers", "use_sliding_window"}


def read_config(folder: str | Path) -> DecoderConfig:
    """Reads the architecture of a model from its config.json.

    Raises:
      UserError: where the file does not exist, the architecture is not supported, or a field
        that may change results is not understood.
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


def decoder_config(fields: Fields) -> DecoderConfig:
    """The architecture of a model from the fields of its config.json; see `read_config`."""
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
    d_model, heads = (
        positive_int(fields, "hidden_size"),
        positive_int(fields, "num_attention_heads"),
    )
    kv_heads = positive_int(fields, "num_key_value_heads", family.kv_heads or heads)
    head_dim = positive_int(fields, "head_dim", family.head_dim or d_model // heads)
    if heads % kv_heads:
        raise UserError(
            f"field 'num_key_value_heads' = {kv_heads}: must divide num_attention_heads = {heads}"
        )
    if head_dim % 2:
        raise UserError(f"field 'head_dim' = {head_dim}: rotary embeddings need it to be even")
    biased = family.attention_bias if boolean(fields, "attention_bias") else ""
    shape: Fields = {"qkv_bias": "qkv" in biased, "o_bias": "o" in biased} | family.fixed
    kinds = family.kinds(family, fields)
    return DecoderConfig(
        vocab_size=positive_int(fields, "vocab_size"),
        d_model=d_model,
        d_ff=positive_int(fields, "intermediate_size"),
        layers=_layers(fields),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=positive_number(fields, "rms_norm_eps"),
        tied_head=boolean(fields, "tie_word_embeddings", family.tied_head),
        mlp_bias=boolean(fields, "mlp_bias"),
        layer_kinds=kinds[:1] if len(set(kinds)) == 1 else kinds,
        **shape,
    )


def _check_fields(family: _Family, fields: Fields) -> None:
    """Raises UserError at a field that may change results and is not understood."""
    if fields.get("auto_map"):
        raise UserError(
            "field 'auto_map': this model needs code from its own folder, which is never run: code "
            "that comes with weights may do anything. Use a folder of one of the supported "
            "architectures without that field"
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


def _layers(fields: Fields) -> int:
    return positive_int(fields, "num_hidden_layers")


def _window(fields: Fields, default: int | None) -> int | None:
    """Window in tokens: null switches it off, a missing field has the default of transformers."""
    if fields.get("sliding_window", default) is None:
        return None
    return positive_int(fields, "sliding_window", default)


def _slides(fields: Fields, types: list[str], window: int | None) -> list[bool]:
    """Whether each layer has a window, from `layer_types`."""
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


def config_json(config: DecoderConfig, max_positions: int = 2048) -> Fields:
    """A config.json for a model that was not read from one (the tiny model).

    Raises:
      ValueError: for an architecture other than Llama, Qwen2 and Qwen3 with a plain rope.
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
        raise ValueError(f"no supported config.json describes {config}")
    return fields
