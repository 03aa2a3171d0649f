"""What the sampler plans to take, and what it really takes."""

import re

import jax
import numpy as np
import pytest

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params
from cipo_jax.sampling import Sampler, SamplingParams
from cipo_jax.sampling.memory import fit_batch_size, free_bytes, plan_memory
from cipo_jax.sampling.state import empty_state
from cipo_jax.training.mesh import make_mesh

CONFIG = DecoderConfig(
    vocab_size=640, d_model=64, d_ff=96, layers=3, heads=8, kv_heads=4, head_dim=32
)
GIB = 2**30
# DeepSeek-R1-Distill-Llama-8B.
LLAMA_8B = DecoderConfig(
    vocab_size=128256, d_model=4096, d_ff=14336, layers=32, heads=32, kv_heads=8, head_dim=128
)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (1, 2, 4)])
@pytest.mark.parametrize("int8", [False, True])
def test_planned_bytes_are_those_of_the_arrays(sizes, int8):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    sampler = Sampler(CONFIG, Compute(), mesh, int8_cache=int8)
    planned = plan_memory(CONFIG, Compute(), mesh, 8, 48, 64, int8_cache=int8, free=GIB)

    def on_first(tree):
        leaves = [x for x in jax.tree.leaves(tree) if x.ndim > 1]
        return sum(x.addressable_shards[0].data.nbytes for x in leaves)

    prompts, state = sampler._programs.empty(
        CONFIG, Compute(), SamplingParams(64, ()).on_device(), int8, (8, 1, 48, 64)
    )
    cache = on_first((prompts.cache, state.cache))
    # One layer more is planned for, for the time in which a ring grows.
    assert planned.cache == cache * (CONFIG.layers + 1) // CONFIG.layers
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(CONFIG))
    weights = jax.tree.leaves(sampler.prepare(zeros))
    assert planned.weights == sum(x.addressable_shards[0].data.nbytes for x in weights)
    assert planned.total == planned.weights + planned.cache + planned.work


def test_shapes_of_an_empty_batch_hold_nothing_else_of_size():
    whole = jax.eval_shape(
        lambda: empty_state(
            CONFIG, Compute(), SamplingParams(64, ()).on_device(), False, (8, 1, 48, 64)
        )
    )
    sizes = sorted((x.size for x in jax.tree.leaves(whole)), reverse=True)
    assert sum(sizes[4 * CONFIG.layers :]) < sizes[0]


def test_an_8b_model_on_a_card_of_80_gib():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    bf16 = Compute(dtype="bfloat16")
    planned = plan_memory(LLAMA_8B, bf16, mesh, 64, 512, 2048, free=80 * GIB)
    # 8.03 billion weights of two bytes; 128 KiB of keys and values a token.
    assert planned.weights == pytest.approx(16.06e9, rel=0.001)
    assert planned.cache == 64 * 2560 * 131072 * 33 // 32
    assert planned.fits
    chosen = fit_batch_size("rows", 0, LLAMA_8B, bf16, mesh, 512, 2048, free=80 * GIB)
    assert chosen.batch_size == 64 and chosen.fits
    assert not plan_memory(LLAMA_8B, bf16, mesh, 256, 512, 2048, free=80 * GIB).fits


def test_what_does_not_fit_is_said_with_what_would():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    bf16 = Compute(dtype="bfloat16")
    with pytest.raises(UserError) as caught:
        fit_batch_size("config.sampling.max_batch_size = 256", 256, LLAMA_8B, bf16, mesh, 512, 4096,
                     free=80 * GIB)  # fmt: skip
    message = str(caught.value)
    assert "\n" not in message and message.startswith(
        "config.sampling.max_batch_size = 256 does not fit"
    )
    (rows,) = re.findall(r"would fit: (\d+) rows", message)
    assert plan_memory(LLAMA_8B, bf16, mesh, int(rows), 512, 4096, free=80 * GIB).fits
    assert not plan_memory(LLAMA_8B, bf16, mesh, 2 * int(rows), 512, 4096, free=80 * GIB).fits
    # On one device there is no other mesh.
    assert "mesh" not in message
    # Weights alone that are too many.
    arguments = ("config.eval.max_batch_size = 0", 0, LLAMA_8B, bf16)
    with pytest.raises(UserError, match=r"GiB free; would fit: larger devices"):
        fit_batch_size(*arguments, mesh, 512, 4096, free=12 * GIB)
    with pytest.raises(UserError, match=r"would fit: config\.mesh\.tensor = 2$"):
        fit_batch_size(*arguments, make_mesh(8, 1, 1), 512, 4096, free=13 * GIB)


def test_half_the_tokens_are_offered_where_they_fit():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    bf16 = Compute(dtype="bfloat16")
    with pytest.raises(UserError, match="8192 new tokens"):
        fit_batch_size("rows", 32, LLAMA_8B, bf16, mesh, 512, 16384, free=64 * GIB)
    assert plan_memory(LLAMA_8B, bf16, mesh, 32, 512, 8192, free=64 * GIB).fits


def test_int8_is_offered_where_it_helps():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    bf16 = Compute(dtype="bfloat16")
    arguments = ("rows", 128, LLAMA_8B, bf16, mesh, 512, 2048)
    with pytest.raises(UserError, match=r"config\.sampling\.int8_cache"):
        fit_batch_size(*arguments, free=60 * GIB)
    assert fit_batch_size(*arguments, free=60 * GIB, int8_cache=True).batch_size == 128


def test_this_machine_has_memory():
    assert 2**28 < free_bytes(jax.devices()[0]) < 2**45
