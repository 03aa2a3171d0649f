"""config.json: published ones are read as transformers reads them, others are refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import DecoderConfig, LayerKind, abstract_params
from cipo_jax.models.hf_config import SUPPORTED, config_json, decoder_config, read_config
from cipo_jax.ops.rope import Rope, frequencies, rotation

# As published, without names of versions; "parameters" is from the pages of the models.
_COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
}
_LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
_QWEN2 = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "max_position_embeddings": 131072,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_QWEN3 = _COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_MISTRAL = _COMMON | {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
_OLMO = _COMMON | {
    "attention_bias": False,
    "eos_token_id": 100257,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
}


def _sizes(hidden, intermediate, layers, heads):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


PUBLISHED = {
    "DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2
    | _sizes(1536, 8960, 28, 12)
    | {"num_key_value_heads": 2, "vocab_size": 151936, "max_window_layers": 21, "use_mrope": False},
    "DeepSeek-R1-Distill-Qwen-7B": _QWEN2
    | _sizes(3584, 18944, 28, 28)
    | {"num_key_value_heads": 4, "max_window_layers": 28, "use_mrope": False},
    "DeepSeek-R1-Distill-Qwen-14B": _QWEN2
    | _sizes(5120, 13824, 48, 40)
    | {
        "num_key_value_heads": 8,
        "max_window_layers": 48,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
    },
    "DeepSeek-R1-Distill-Llama-8B": _LLAMA | _sizes(4096, 14336, 32, 32) | {"eos_token_id": 128001},
    "DeepSeek-R1-Distill-Llama-70B": _LLAMA | _sizes(8192, 28672, 80, 64),
    "DeepSeek-R1-0528-Qwen3-8B": _QWEN3
    | _sizes(4096, 12288, 36, 32)
    | {
        "max_position_embeddings": 131072,
        "max_window_layers": 36,
        "rope_scaling": {
            "attn_factor": 0.8782488562869419,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "rope_type": "yarn",
        },
    },
    "Qwen3-0.6B": _QWEN3
    | _sizes(1024, 3072, 28, 16)
    | {"max_window_layers": 28, "tie_word_embeddings": True},
    "Qwen3-32B": _QWEN3 | _sizes(5120, 25600, 64, 64) | {"max_window_layers": 64},
    "QwQ-32B": _QWEN2
    | _sizes(5120, 27648, 64, 40)
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 40960,
        "max_window_layers": 64,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
    },
    "Llama-3.1-8B": _LLAMA | _sizes(4096, 14336, 32, 32),
    "Llama-3.2-1B-Instruct": _LLAMA
    | _sizes(2048, 8192, 16, 32)
    | {
        "head_dim": 64,
        "rope_scaling": _LLAMA["rope_scaling"] | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "SmolLM2-135M-Instruct": _LLAMA
    | _sizes(576, 1536, 30, 9)
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "vocab_size": 49152,
    },
    "Mistral-7B-v0.1": _MISTRAL
    | {"rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
    "Mistral-7B-v0.3": _MISTRAL
    | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
    "SmolLM3-3B": _COMMON
    | _sizes(2048, 11008, 36, 16)
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "eos_token_id": 128012,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_key_value_heads": 4,
        "pad_token_id": 128004,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "OLMo-2-1124-7B": _OLMO
    | {
        "architectures": ["Olmo2ForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "rope_scaling": None,
        "torch_dtype": "float32",
        "vocab_size": 100352,
    },
    "Olmo-3-7B-Think": _OLMO
    | {
        "architectures": ["Olmo3ForCausalLM"],
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        "max_position_embeddings": 65536,
        "model_type": "olmo3",
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "sliding_window": 4096,
        "use_cache": False,
        "vocab_size": 100278,
    },
}
PARAMETERS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
    "DeepSeek-R1-0528-Qwen3-8B": 8_190_735_360,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-32B": 32_762_123_264,
    "QwQ-32B": 32_763_876_352,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "SmolLM2-135M-Instruct": 134_515_008,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "SmolLM3-3B": 3_075_098_624,
    "OLMo-2-1124-7B": 7_298_617_344,
    "Olmo-3-7B-Think": 7_298_011_136,
}
_LLAMA3 = Rope(5e5, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
_OLMO3_YARN = Rope(5e5, "yarn", 8.0, 8192, scale=1.2079441541679836)
_SMOLLM3 = Rope(5e6)
KINDS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": [LayerKind(Rope(1e4))],
    "DeepSeek-R1-Distill-Qwen-7B": [LayerKind(Rope(1e4))],
    "DeepSeek-R1-Distill-Qwen-14B": [LayerKind(Rope(1e6))],
    "DeepSeek-R1-Distill-Llama-8B": [LayerKind(_LLAMA3)],
    "DeepSeek-R1-Distill-Llama-70B": [LayerKind(_LLAMA3)],
    # transformers ignores attn_factor; the scale is that of the paper.
    "DeepSeek-R1-0528-Qwen3-8B": [
        LayerKind(Rope(1e6, "yarn", 4.0, 32768, scale=0.1 * math.log(4) + 1))
    ],
    "Qwen3-0.6B": [LayerKind(Rope(1e6))],
    "Qwen3-32B": [LayerKind(Rope(1e6))],
    "QwQ-32B": [LayerKind(Rope(1e6))],
    "Llama-3.1-8B": [LayerKind(_LLAMA3)],
    "Llama-3.2-1B-Instruct": [LayerKind(dataclasses.replace(_LLAMA3, factor=32.0))],
    "SmolLM2-135M-Instruct": [LayerKind(Rope(1e5))],
    "Mistral-7B-v0.1": [LayerKind(Rope(1e4), 4096)],
    "Mistral-7B-v0.3": [LayerKind(Rope(1e6))],
    "SmolLM3-3B": ([LayerKind(_SMOLLM3)] * 3 + [LayerKind(None)]) * 9,
    "OLMo-2-1124-7B": [LayerKind(Rope(5e5))],
    "Olmo-3-7B-Think": ([LayerKind(Rope(5e5), 4096)] * 3 + [LayerKind(_OLMO3_YARN)]) * 8,
}


def error_of(folder, fields):
    """The error of read_config: one line that names the file."""
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError) as caught:
        read_config(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_are_read(model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[model]))
    config = read_config(tmp_path)
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(abstract_params(config))]
    assert sum(sizes) == PARAMETERS[model]
    assert list(config.layer_kinds) == KINDS[model]
    fields = PUBLISHED[model]
    family = fields["model_type"]
    assert config.head_dim == (64 if "1B" in model or "135M" in model else 128)
    assert config.norm_eps == fields["rms_norm_eps"]
    assert config.qkv_bias == (family == "qwen2")
    assert not config.o_bias and not config.mlp_bias
    assert config.qk_norm == {"qwen3": "head", "olmo2": "all", "olmo3": "all"}.get(family, "none")
    assert config.post_norm == (family in ("olmo2", "olmo3"))
    # The head of SmolLM3 is tied by default; the file does not have the field.
    assert config.tied_head == fields.get("tie_word_embeddings", family == "smollm3")


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
}
SLIDES = {"sliding_window": 16, "use_sliding_window": True}


def small(family="Llama", **fields):
    return (
        SMALL | {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()} | fields
    )


def kinds_of(family, **fields):
    kinds = decoder_config(small(family, **fields)).layer_kinds
    return list(kinds) * (4 // len(kinds))


def windows_of(family, **fields):
    return [kind.window for kind in kinds_of(family, **fields)]


def test_older_and_newer_spellings_of_rope_give_one_config():
    spellings = [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        # The more specific one counts, as in transformers.
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ]
    assert {decoder_config(small(**rope)) for rope in spellings} == {
        decoder_config(small(rope_theta=5e5))
    }
    assert decoder_config(small(rope_theta=5e5)).layer_kinds == (LayerKind(Rope(5e5)),)
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32}
    spellings = [
        {"rope_theta": 5e5, "rope_scaling": yarn | {"rope_type": "yarn"}},
        {"rope_theta": 5e5, "rope_scaling": yarn | {"type": "yarn"}},
        {"rope_theta": 5e5, "rope_scaling": yarn | {"type": "yarn", "rope_type": "yarn"}},
        {"rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 5e5}},
    ]
    wanted = (LayerKind(Rope(5e5, "yarn", 4.0, 32, scale=0.1 * math.log(4) + 1)),)
    for rope in spellings:
        assert decoder_config(small(**rope)).layer_kinds == wanted


def test_missing_fields_have_the_defaults_of_transformers():
    for family in ("Llama", "Qwen2", "Qwen3", "SmolLM3", "Olmo2", "Olmo3", "Mistral"):
        config = decoder_config(small(family))
        assert config.tied_head == (family == "SmolLM3")
        assert config.head_dim == (128 if family == "Qwen3" else 8)
        theta = {"SmolLM3": 2e6, "Olmo3": 5e5}.get(family, 1e4)
        assert {k.rope for k in config.layer_kinds} - {None} == {Rope(theta)}
        assert {k.window for k in config.layer_kinds} == {
            "Mistral": {4096}, "Olmo3": {4096, None},
        }.get(family, {None})  # fmt: skip


def test_windows_are_where_the_config_switches_them_on():
    for family in ("Qwen2", "Qwen3"):
        assert windows_of(family, sliding_window=16, max_window_layers=1) == [None] * 4
        assert windows_of(family, **SLIDES, max_window_layers=1) == [None, 16, 16, 16]
        assert windows_of(family, **SLIDES) == [None] * 4  # 28 by default
        types = ["sliding_attention", "full_attention"] * 2
        assert windows_of(family, **SLIDES, layer_types=types) == [16, None] * 2
        assert windows_of(family, use_sliding_window=True, max_window_layers=2)[2:] == [4096] * 2
    assert windows_of("Mistral", sliding_window=16) == [16] * 4
    assert windows_of("Mistral", sliding_window=None) == [None] * 4
    assert windows_of("Olmo3", sliding_window=16) == [16, 16, 16, None]
    # Layers with a rope attend to everything.
    assert windows_of("SmolLM3", **SLIDES, no_rope_layers=[1, 0, 1, 0]) == [None, 16] * 2
    ropes = [kind.rope for kind in kinds_of("SmolLM3", no_rope_layers=[1, 0, 0, 1])]
    assert ropes == [Rope(2e6), None, None, Rope(2e6)]
    ropes = [kind.rope for kind in kinds_of("SmolLM3", no_rope_layer_interval=2)]
    assert ropes == [Rope(2e6), None] * 2


def test_biases_are_where_the_config_has_them():
    def biases(family, **fields):
        config = decoder_config(small(family, **fields))
        return config.qkv_bias, config.o_bias, config.mlp_bias

    assert biases("Llama") == (False, False, False)
    for family in ("Llama", "SmolLM3"):
        assert biases(family, attention_bias=True) == (True, True, False)
        assert biases(family, mlp_bias=True) == (False, False, True)
    for family in ("Qwen3", "Olmo2", "Olmo3"):
        assert biases(family, attention_bias=True) == (True, True, False)
    # Independent of that field, as in transformers.
    for fields in ({}, {"attention_bias": False}, {"attention_bias": True}):
        assert biases("Qwen2", **fields) == (True, False, False)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
HALF = ["full_attention", "sliding_attention"] * 2
PLAIN = {"rope_type": "default"}


@pytest.mark.parametrize(
    ("family", "field", "fields"),
    [
        # Fields that no architecture here has.
        ("Llama", "attention_multiplier", {"attention_multiplier": 0.5}),
        ("Llama", "logit_scale", {"logit_scale": 0}),
        ("Llama", "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("Llama", "original_max_position_embeddings", {"original_max_position_embeddings": 16}),
        ("Llama", "hidden_act", {"hidden_act": "gelu"}),
        ("Llama", "per_layer_config", {"per_layer_config": {"0": {"hidden_size": 8}}}),
        # Fields of other architectures.
        ("Mistral", "attention_bias", {"attention_bias": True}),
        ("Qwen3", "mlp_bias", {"mlp_bias": True}),
        ("Olmo2", "mlp_bias", {"mlp_bias": True}),
        ("Llama", "no_rope_layers", {"no_rope_layers": [1, 0, 1, 0]}),
        # Windows.
        ("Llama", "sliding_window", {"sliding_window": 16}),
        ("Llama", "sliding_window", SLIDES),
        ("Olmo2", "sliding_window", {"sliding_window": 16}),
        ("Mistral", "use_sliding_window", SLIDES),
        ("Mistral", "sliding_window", {"sliding_window": 0}),
        ("Olmo3", "sliding_window", {"sliding_window": -1}),
        ("Mistral", "sliding_window", {"sliding_window": 16.5}),
        ("Mistral", "sliding_window", {"sliding_window": True}),
        ("Llama", "layer_types", {"layer_types": HALF}),
        ("Mistral", "layer_types", {"layer_types": HALF, "sliding_window": 16}),
        ("Qwen2", "layer_types", {"layer_types": HALF[:3], **SLIDES}),
        ("Qwen2", "layer_types", {"layer_types": ["chunked_attention"] * 4}),
        ("Qwen2", "layer_types", {"layer_types": "full_attention"}),
        # Sliding layers without a window: transformers fails, or reads sliding_window.
        ("Qwen2", "layer_types", {"layer_types": HALF, "sliding_window": 16}),
        ("SmolLM3", "layer_types", {"layer_types": HALF, "sliding_window": 16}),
        ("SmolLM3", "layer_types", {"layer_types": HALF}),
        ("SmolLM3", "no_rope_layers", {"no_rope_layers": [1, 0]}),
        ("SmolLM3", "no_rope_layer_interval", {"no_rope_layer_interval": 0}),
        # Ropes.
        ("Llama", "longrope", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}),
        ("Llama", "rope_scaling", {"rope_scaling": "yarn"}),
        ("Llama", "rope_scaling", {"rope_scaling": ["yarn"]}),
        ("Llama", "factor", {"rope_scaling": {"type": "linear"}}),
        ("Llama", "factor", {"rope_scaling": {"type": "dynamic"}}),
        ("Llama", "factor", {"rope_scaling": {"type": "linear", "factor": "2"}}),
        ("Llama", "factor", {"rope_scaling": {"type": "linear", "factor": 0}}),
        ("Llama", "low_freq_factor", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ("Llama", "mscale", {"rope_scaling": LLAMA3 | {"mscale": 1.0}}),
        ("Llama", "finetuned", {"rope_scaling": YARN | {"finetuned": True}}),
        ("Llama", "factor", {"rope_scaling": PLAIN | {"factor": 2.0}}),
        ("Llama", "partial_rotary_factor", {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}),
        ("Llama", "rope_theta", {"rope_theta": 0}),
        ("Llama", "rope_theta", {"rope_theta": "1e4"}),
        ("Qwen3", "full_attention", {"rope_parameters": {"full_attention": PLAIN}}),
        # One of them would have to be ignored.
        (
            "Llama",
            "rope_scaling",
            {"rope_parameters": PLAIN | {"rope_theta": 1e4}, "rope_scaling": YARN},
        ),
        (
            "Olmo3",
            "rope_scaling",
            {"rope_parameters": {"full_attention": PLAIN}, "rope_scaling": YARN},
        ),
        # Ignored by transformers, which reads Olmo3's per kind of layer.
        ("Olmo3", "rope_parameters", {"rope_parameters": YARN | {"rope_theta": 7.0}}),
        ("Olmo3", "other", {"rope_parameters": {"full_attention": PLAIN, "other": PLAIN}}),
        # Types and sizes.
        ("Llama", "hidden_size", {"hidden_size": "32"}),
        ("Llama", "hidden_size", {"hidden_size": 32.5}),
        ("Llama", "hidden_size", {"hidden_size": None}),
        ("Llama", "vocab_size", {"vocab_size": "many"}),
        ("Llama", "vocab_size", {"vocab_size": -3}),
        ("Llama", "num_hidden_layers", {"num_hidden_layers": 0}),
        ("Llama", "num_hidden_layers", {"num_hidden_layers": True}),
        ("Llama", "num_attention_heads", {"num_attention_heads": 0}),
        ("Llama", "num_key_value_heads", {"num_key_value_heads": 3}),
        ("Llama", "head_dim", {"head_dim": 7}),
        ("Llama", "head_dim", {"head_dim": 8.5}),
        ("Llama", "rms_norm_eps", {"rms_norm_eps": None}),
        ("Llama", "rms_norm_eps", {"rms_norm_eps": "tiny"}),
        ("Llama", "tie_word_embeddings", {"tie_word_embeddings": "false"}),
        ("Llama", "attention_bias", {"attention_bias": "no"}),
        ("Qwen2", "use_sliding_window", {"use_sliding_window": "false"}),
        ("Qwen2", "max_window_layers", {"max_window_layers": "2", **SLIDES}),
        (
            "Llama",
            "max_position_embeddings",
            {"max_position_embeddings": "2", "rope_scaling": YARN},
        ),
        # Contradictory or quantized.
        ("Llama", "model_type", {"model_type": "qwen2"}),
        ("Llama", "quantization_config", {"quantization_config": {"quant_method": "fp8"}}),
    ],
)
def test_a_field_that_is_not_understood_is_named(family, field, fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small(family)))
    read_config(tmp_path)
    assert field in error_of(tmp_path, small(family, **fields))


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "rms_norm_eps",
    ],
)  # fmt: skip
def test_a_missing_field_is_named(field, tmp_path):
    fields = small()
    del fields[field]
    assert f"{field!r} is missing" in error_of(tmp_path, fields)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "llama3"])
def test_scaled_ropes_need_the_context(kind, tmp_path):
    fields = small(rope_scaling=LLAMA3 | {"rope_type": kind})
    if kind != "llama3":
        fields["rope_scaling"] = {"rope_type": kind, "factor": 2.0}
    del fields["max_position_embeddings"]
    assert "'max_position_embeddings' is missing" in error_of(tmp_path, fields)


@pytest.mark.parametrize("names", [["MixtralForCausalLM"], ["GPT2LMHeadModel"], [], None])
def test_errors_for_unsupported_architectures_list_the_supported_ones(names, tmp_path):
    message = error_of(tmp_path, small(architectures=names))
    assert (names or ["(none)"])[0] in message
    for name in SUPPORTED:
        assert name in message


def test_code_that_comes_with_weights_is_refused_with_the_reason(tmp_path):
    auto_map = {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    (tmp_path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    message = error_of(tmp_path, small(auto_map=auto_map))
    assert "auto_map" in message
    assert "code" in message
    assert not (tmp_path / "ran").exists()


def test_harmless_fields_change_nothing():
    harmless = {
        "_name_or_path": "somewhere", "torch_dtype": "float16", "dtype": "bfloat16",
        "use_cache": False, "bos_token_id": 7, "eos_token_id": [7, 8], "pad_token_id": None,
        "initializer_range": 0.5, "attention_dropout": 0.1, "transformers_version": "9",
        "pretraining_tp": 2, "anything": None, "use_sliding_window": False, "max_window_layers": 1,
    }  # fmt: skip
    assert decoder_config(small(**harmless)) == decoder_config(small())


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "wanted"), [('{\n"vocab_size": 3,\n}', ":3"), ("[1]", "object"), ("\xff", "")]
)
def test_a_file_that_is_not_a_json_object_is_named(text, wanted, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert f"{path}{wanted}" in str(caught.value) or wanted in str(caught.value)
    assert str(path) in str(caught.value)


def _random_rope(rng, kind):
    """Fields of a config.json with a valid rope of a kind."""
    trained = int(2 ** rng.uniform(5, 17))
    fields = {
        "head_dim": int(rng.choice([4, 10, 64, 80, 128])),
        "rope_theta": float(10 ** rng.uniform(1, 7)),
        "max_position_embeddings": trained,
    }
    rope = {"rope_type": kind, "factor": float(rng.uniform(1, 64))}

    def maybe(**values):
        return {k: v for k, v in values.items() if rng.random() < 0.5}

    if kind in ("llama3", "yarn"):
        fields["max_position_embeddings"] = int(trained * rope["factor"]) + 1
        rope |= {"original_max_position_embeddings": trained}
    if kind == "llama3":
        low = float(rng.uniform(0.5, 4))
        rope |= {"low_freq_factor": low, "high_freq_factor": low + float(rng.uniform(0.1, 8))}
    if kind == "yarn":
        rope |= maybe(
            beta_fast=float(rng.uniform(4, 64)),
            beta_slow=float(rng.uniform(0.1, 4)),
            attention_factor=float(rng.uniform(0.5, 2)),
            truncate=bool(rng.random() < 0.5),
            attn_factor=0.9,
            mscale=float(rng.uniform(0.1, 2)),
            mscale_all_dim=float(rng.uniform(0.1, 2)),
        )
    return fields | {"rope_scaling": rope}


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_random_ropes_are_those_of_transformers(kind):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rng = np.random.default_rng(0)
    stretched = 0
    for _ in range(100):
        fields = small(**_random_rope(rng, kind))
        theirs = LlamaConfig.from_dict(json.loads(json.dumps(fields)))
        length = int(rng.integers(1, 4 * fields["max_position_embeddings"]))
        wanted, scale = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=length)
        rope = decoder_config(fields).layer_kinds[0].rope
        if kind == "dynamic":
            # Angles at position 1, which are frequencies.
            by = rotation(rope, fields["head_dim"], jnp.array([[1]]), jnp.array([[length]]))
            found = np.arctan2(by.sin, by.cos)[0, 0]
        else:
            found = frequencies(rope, fields["head_dim"])
        plain = frequencies(Rope(fields["rope_theta"]), fields["head_dim"])
        stretched += not np.allclose(found, plain, rtol=1e-3)
        # Powers of float32 numbers near 1e6 have an error of about 1e-5.
        np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-5, err_msg=str(fields))
        assert rope.scale == pytest.approx(scale, rel=1e-12)
    assert stretched > 50


@pytest.mark.parametrize(
    "shape", [{}, {"tied_head": True}, {"qkv_bias": True}, {"qk_norm": "head"}], ids=str
)
def test_config_json_describes_the_model(shape):
    config = DecoderConfig(64, 32, 48, 2, 4, 2, 10, layer_kinds=(LayerKind(Rope(7.0)),), **shape)
    fields = json.loads(json.dumps(config_json(config)))
    assert decoder_config(fields) == config


@pytest.mark.parametrize(
    "shape",
    [
        {"o_bias": True},
        {"mlp_bias": True},
        {"post_norm": True, "qk_norm": "all"},
        {"qkv_bias": True, "qk_norm": "head"},
        {"layer_kinds": (LayerKind(Rope(kind="linear", factor=2.0)),)},
        {"layer_kinds": (LayerKind(window=8),)},
        {"layer_kinds": (LayerKind(None),)},
    ],
    ids=str,
)
def test_config_json_refuses_other_models(shape):
    with pytest.raises(ValueError, match=r"config\.json"):
        config_json(DecoderConfig(64, 32, 48, 2, 4, 2, 8, **shape))
