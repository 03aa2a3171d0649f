"""Configs of large models, traced on a mesh of eight devices without any weights."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_batch import generate

from cipo_jax.commands.flags import load_config
from cipo_jax.config import Config, parse
from cipo_jax.data.batches import CompletionBatch
from cipo_jax.methods.cipo.objective import PreferenceObjective, WarmupObjective
from cipo_jax.models.decoder import abstract_params, decoding_layout
from cipo_jax.models.hf_config import decoder_config
from cipo_jax.models.lora import Lora, abstract_adapters, assemble
from cipo_jax.models.pretrained import compute_from_config
from cipo_jax.sampling.params import SamplingParams
from cipo_jax.training.mesh import decoding_shardings, make_mesh
from cipo_jax.training.optimizer import AdamW
from cipo_jax.training.policy import Policy
from cipo_jax.training.step import TrainStep

CONFIGS = Path(__file__).parents[1] / "configs"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        "attn_factor": 0.8782488562869419,
    },
}  # fmt: skip
QWEN_1P5B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936,
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21,
}  # fmt: skip
LARGE = {
    "rtofu.py:model=llama8b": (LLAMA_8B, 8.03e9),
    "rtofu.py:model=qwen3_8b": (QWEN3_8B, 8.19e9),
    "return.py:model=llama8b": (LLAMA_8B, 8.03e9),
    "rtofu.py:model=qwen1p5b,lora=true": (QWEN_1P5B, 1.78e9),
}


def read(name):
    return parse(Config, load_config(str(CONFIGS / name)))


def rows(mesh, config, batch, *sides):
    """A batch of the longest lengths that the config lets through, as shapes."""
    total = config.data.max_prompt_tokens + config.data.max_completion_tokens
    completion = config.data.max_completion_tokens
    if sides:
        completion = config.sampling.max_new_tokens
        total = config.data.max_prompt_tokens + completion
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))

    def shape(*sizes):
        return jax.ShapeDtypeStruct((batch, *sides, *sizes), jnp.int32, sharding=sharding)

    return CompletionBatch(shape(total), shape(), shape(completion), shape())


def per_device(tree):
    """Bytes of a tree on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize("name", LARGE)
def test_large_models_are_built_on_eight_devices(name):
    fields, published = LARGE[name]
    config, shape = read(name), decoder_config(fields)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    parameters = abstract_params(shape)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(parameters))
    assert count == pytest.approx(published, rel=0.01)

    lora = Lora.from_config(config.lora)
    for settings, objective, batch in (
        (
            config.warmup,
            WarmupObjective(config.cipo.retain_weight),
            {"chosen": rows(mesh, config, config.warmup.batch_size)},
        ),
        (
            config.train,
            PreferenceObjective.from_config(config.cipo),
            {
                "pairs": rows(mesh, config, config.train.batch_size, 2),
                "ref": jax.ShapeDtypeStruct((config.train.batch_size, 2), jnp.float32),
                "weights": jax.ShapeDtypeStruct((config.train.batch_size,), jnp.float32),
                "retain": rows(mesh, config, config.train.retain_batch_size),
            },
        ),
    ):
        step = TrainStep(
            Policy(shape, compute_from_config(config.model)),
            objective,
            AdamW.from_config(settings),
            mesh,
            lora,
            settings.gradient_accumulation_steps,
        )
        state = step.abstract_state()
        # Lowered with its shardings: an axis that did not divide would be an error here.
        new, metrics = step.lower(batch).out_info
        same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, state)
        assert all(jax.tree.leaves(same))
        assert metrics["loss"].shape == ()

        if lora:
            assert sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)) < 0.02 * count
        else:
            # Parameters and both moments in float32, over eight devices but for the norms' scales.
            assert per_device(state) == pytest.approx(12 * count / 8, rel=0.01)


@pytest.mark.parametrize("name", ["rtofu.py:model=qwen3_8b", "rtofu.py:model=qwen1p5b,lora=true"])
def test_large_models_are_sampled_from_on_eight_devices(name):
    config, shape = read(name), decoder_config(LARGE[name][0])
    mesh, lora = make_mesh(**dataclasses.asdict(config.mesh)), Lora.from_config(config.lora)
    params = abstract_params(shape)
    if lora:
        adapters = abstract_adapters(shape, lora)
        params = jax.eval_shape(lambda p, a: assemble(lora, p, a), params, adapters)
    layout = jax.eval_shape(lambda p: decoding_layout(shape, p, config.model.decode_dtype), params)
    assert {x.dtype for x in jax.tree.leaves(layout)} == {jnp.dtype("bfloat16")}
    decoding_shardings(layout, mesh)  # Raises where an axis does not divide.
    sampling_params = SamplingParams(
        config.sampling.max_new_tokens, (1, 2), 1.0, 0.95, shape.vocab_size - 200
    )
    out = jax.eval_shape(
        lambda *arrays: generate(
            shape, compute_from_config(config.model, decoding=True), sampling_params, *arrays
        ),
        layout,
        np.zeros((8, 64), np.int32),
        np.ones(8, np.int32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (8, 2))),
    )
    assert out.ids.shape == (8, 2, config.sampling.max_new_tokens)
