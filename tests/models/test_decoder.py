import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_options import QUICK

from cipo_jax.models.decoder import (
    Compute,
    DecoderConfig,
    LayerKind,
    abstract_params,
    decode_layers,
    decoding_layout,
    head_matrix,
    hidden_states,
    init_params,
)
from cipo_jax.ops.attention import causal_attention
from cipo_jax.ops.rope import Rope

# Two compilations of one float32 computation: hidden states are near 1 after the last norm.
TOLERANCE = 2e-5
BASE = DecoderConfig(
    vocab_size=48, d_model=16, d_ff=24, layers=2, heads=4, kv_heads=2, head_dim=6, tied_head=True
)
KINDS = {
    "plain": BASE,
    "untied": dataclasses.replace(BASE, tied_head=False),
    "qkv_bias": dataclasses.replace(BASE, qkv_bias=True),
    "qk_norm": dataclasses.replace(BASE, qk_norm="head"),
    "wide_qk_norm": dataclasses.replace(BASE, qk_norm="all"),
    "all_biases": dataclasses.replace(BASE, qkv_bias=True, o_bias=True, mlp_bias=True),
    "post_norm": dataclasses.replace(BASE, post_norm=True),
    "window": dataclasses.replace(BASE, layer_kinds=(LayerKind(window=3),)),
    "no_rope": dataclasses.replace(BASE, layer_kinds=(LayerKind(None),)),
    "kinds": dataclasses.replace(
        BASE,
        layers=4,
        layer_kinds=(
            LayerKind(window=3),
            LayerKind(None),
            LayerKind(Rope(100.0, "dynamic", 2.0, 4), window=5),
            LayerKind(window=3),
        ),
    ),
}


def random_params(config, seed=0):
    """Parameters of which none is at its trivial value: scales near 1, biases not 0."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        noise = rng.normal(scale=0.3, size=leaf.shape)
        return jnp.asarray(noise + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_params(config))


def random_tokens(batch=3, length=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 48, (batch, length)), jnp.int32)


hidden = jax.jit(hidden_states, static_argnums=(0, 1), compiler_options=QUICK)


@pytest.mark.parametrize(
    ("kind", "prompt_length"), [*((kind, None) for kind in KINDS), ("kinds", 1), ("kinds", 6)]
)
def test_scanned_and_unrolled_layouts_agree(kind, prompt_length):
    config, compute = KINDS[kind], Compute()
    params, tokens = random_params(config), random_tokens()
    lengths = None
    if prompt_length:  # As a sampler computes them: the prompt at once, then token by token.
        lengths = jnp.broadcast_to(jnp.maximum(prompt_length, jnp.arange(1, 9)), tokens.shape)

    @jax.jit(compiler_options=QUICK)
    def unrolled(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        layout = decoding_layout(config, params, "float32")
        windows = [config.kinds()[i].window for i in config.kind_ids()]

        def attend(layer, q, k, v):
            return causal_attention(q, k, v, window=windows[layer]), layer

        return decode_layers(config, compute, layout, tokens, positions, attend, lengths)

    found, kept = unrolled(params, tokens)
    wanted = hidden(config, compute, params, tokens, lengths)
    assert kept == list(range(config.layers))
    assert float(jnp.std(wanted)) > 0.5
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_layers_are_of_the_kinds_that_were_given():
    config = KINDS["kinds"]
    assert config.kinds() == config.layer_kinds[:3]
    assert config.kind_ids() == [0, 1, 2, 0]
    assert KINDS["window"].kind_ids() == [0, 0]
    for count in (0, 2, 3, 5):
        with pytest.raises(ValueError, match=f"{count} entries for 4 layers"):
            dataclasses.replace(config, layer_kinds=(LayerKind(),) * count)


def test_the_kind_of_each_layer_changes_the_hidden_states():
    config, tokens = KINDS["kinds"], random_tokens()
    params = random_params(config)
    wanted = hidden(config, Compute(), params, tokens)
    for layer in range(config.layers):
        kinds = list(config.layer_kinds)
        kinds[layer] = LayerKind()
        other = dataclasses.replace(config, layer_kinds=tuple(kinds))
        assert float(jnp.max(jnp.abs(hidden(other, Compute(), params, tokens) - wanted))) > 1e-2


def test_padding_never_changes_earlier_hidden_states():
    params = random_params(BASE)
    tokens, lengths = random_tokens(), np.array([8, 5, 1])
    real = np.arange(8) < lengths[:, None]
    wanted = np.asarray(hidden(BASE, Compute(), params, tokens))
    refilled = jnp.where(real, tokens, random_tokens(seed=1))
    found = np.asarray(hidden(BASE, Compute(), params, refilled))
    np.testing.assert_array_equal(found[real], wanted[real])
    assert not np.array_equal(found, wanted)
    longer = np.asarray(hidden(BASE, Compute(), params, jnp.pad(refilled, ((0, 0), (0, 8)))))
    np.testing.assert_allclose(longer[:, :8][real], wanted[real], rtol=0, atol=TOLERANCE)


def test_remat_modes_agree_and_recompute():
    params, tokens = random_params(BASE), random_tokens()
    results, residuals = {}, {}
    for remat in ("none", "full", "names"):
        compute = Compute(remat=remat)

        def loss(params, compute=compute):
            return jnp.sum(jnp.square(hidden_states(BASE, compute, params, tokens)[..., 0]))

        function = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
        results[remat] = function(params)
        backward = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
        residuals[remat] = sum(x.size for x in jax.tree.leaves(backward))
    for remat in ("full", "names"):
        for a, b in zip(*map(jax.tree.leaves, (results[remat], results["none"])), strict=True):
            scale = float(jnp.max(jnp.abs(b)))
            np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * scale)
    # The residuals of the backward pass shrink in this order.
    assert residuals["full"] < residuals["names"] < residuals["none"]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_have_their_shapes(kind):
    config = KINDS[kind]
    L = config.layers
    block = {
        "attn_norm": {"scale": (L, 16)},
        "mlp_norm": {"scale": (L, 16)},
        "q": {"kernel": (L, 16, 4, 6)},
        "k": {"kernel": (L, 16, 2, 6)},
        "v": {"kernel": (L, 16, 2, 6)},
        "o": {"kernel": (L, 4, 6, 16)},
        "gate": {"kernel": (L, 16, 24)},
        "up": {"kernel": (L, 16, 24)},
        "down": {"kernel": (L, 24, 16)},
    }
    if kind in ("qkv_bias", "all_biases"):
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            block[name]["bias"] = (L, heads, 6)
    if kind == "all_biases":
        for name, size in (("o", 16), ("gate", 24), ("up", 24), ("down", 16)):
            block[name]["bias"] = (L, size)
    if kind == "qk_norm":
        block |= {"q_norm": {"scale": (L, 6)}, "k_norm": {"scale": (L, 6)}}
    if kind == "wide_qk_norm":
        block |= {"q_norm": {"scale": (L, 24)}, "k_norm": {"scale": (L, 12)}}
    wanted = {"embed": (48, 16), "final_norm": {"scale": (16,)}, "layers": {"block": block}}
    if kind == "untied":
        wanted["head"] = (16, 48)

    def shapes(tree):
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(tree))
        return jax.tree.map(lambda x: x.shape, tree)

    assert shapes(abstract_params(config)) == wanted


def test_abstract_params_has_the_shapes_of_init_params():
    init = jax.jit(init_params, static_argnums=0, compiler_options=QUICK)
    params = init(BASE, jax.random.key(0))

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert shapes(params) == shapes(abstract_params(BASE))
    assert float(jnp.std(params["embed"])) == pytest.approx(0.02, rel=0.1)
    # Layers have different values.
    kernels = params["layers"]["block"]["gate"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


def test_a_tied_head_is_the_embedding():
    params = random_params(KINDS["untied"])
    np.testing.assert_array_equal(head_matrix(KINDS["plain"], params), params["embed"].T)
    np.testing.assert_array_equal(head_matrix(KINDS["untied"], params), params["head"])
    for kind in ("plain", "untied"):
        layout = decoding_layout(KINDS[kind], params, "bfloat16")
        assert {x.dtype for x in jax.tree.leaves(layout)} == {jnp.dtype("bfloat16")}
        wanted = head_matrix(KINDS[kind], params).astype(jnp.bfloat16)
        np.testing.assert_array_equal(
            layout["head"].astype(jnp.float32), wanted.astype(jnp.float32)
        )


def with_block(params, name, change):
    block = params["layers"]["block"]
    return {**params, "layers": {"block": {**block, name: jax.tree.map(change, block[name])}}}


def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant():
    tokens = random_tokens()
    for kind, moves in (("qk_norm", False), ("plain", True)):
        params = random_params(KINDS[kind])
        wanted = hidden(KINDS[kind], Compute(), params, tokens)
        scaled = with_block(with_block(params, "q", lambda x: 4 * x), "k", lambda x: 4 * x)
        found = hidden(KINDS[kind], Compute(), scaled, tokens)
        # Norms divide by sqrt(mean square + 1e-6), so that scales change about 1e-6.
        difference = float(jnp.max(jnp.abs(found - wanted)))
        assert difference > 1e-1 if moves else difference < 1e-3


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_scales_of_qk_norms_change_the_hidden_states(name):
    config, tokens = KINDS["qk_norm"], random_tokens()
    params = random_params(config)
    wanted = hidden(config, Compute(), params, tokens)
    found = hidden(config, Compute(), with_block(params, name, lambda x: 4 * x), tokens)
    assert float(jnp.max(jnp.abs(found - wanted))) > 1e-1


def test_norms_of_heads_apart_and_together():
    """A norm over each head cancels a scale of one head; a norm over all heads does not."""
    one_head = jnp.array([4.0, 1.0])[:, None]
    for kind, scale, moves in (
        ("qk_norm", one_head, False),
        ("wide_qk_norm", one_head, True),
        ("wide_qk_norm", 4.0, False),
    ):
        config, tokens = KINDS[kind], random_tokens()
        params = random_params(config)
        wanted = hidden(config, Compute(), params, tokens)
        scaled = with_block(params, "k", functools.partial(jnp.multiply, scale))
        found = hidden(config, Compute(), scaled, tokens)
        difference = float(jnp.max(jnp.abs(found - wanted)))
        assert difference > 1e-1 if moves else difference < 1e-3


@pytest.mark.parametrize("name", ["o", "down"])
def test_post_norms_make_the_scale_of_a_branch_irrelevant(name):
    tokens = random_tokens()
    for kind, moves in (("post_norm", False), ("plain", True)):
        params = random_params(KINDS[kind])
        wanted = hidden(KINDS[kind], Compute(), params, tokens)
        scaled = with_block(params, name, lambda x: 4 * x)
        found = hidden(KINDS[kind], Compute(), scaled, tokens)
        difference = float(jnp.max(jnp.abs(found - wanted)))
        assert difference > 1e-1 if moves else difference < 1e-3


@pytest.mark.parametrize("name", ["q", "k", "v", "o", "gate", "up", "down"])
def test_biases_change_the_hidden_states(name):
    config, tokens = KINDS["all_biases"], random_tokens()
    params = random_params(config)
    wanted = hidden(config, Compute(), params, tokens)
    without = {"bias": jnp.zeros_like, "kernel": lambda x: x}
    block = params["layers"]["block"]
    projection = {part: without[part](x) for part, x in block[name].items()}
    params = {**params, "layers": {"block": {**block, name: projection}}}
    found = hidden(config, Compute(), params, tokens)
    assert float(jnp.max(jnp.abs(found - wanted))) > 1e-2


def test_bfloat16_stays_near_float32():
    params, tokens = random_params(BASE), random_tokens()
    narrow = hidden(BASE, Compute(dtype="bfloat16"), params, tokens)
    assert narrow.dtype == jnp.bfloat16
    wanted = hidden(BASE, Compute(), params, tokens)
    # Eight bits a rounding, a dozen roundings in a row, hidden states near 1.
    np.testing.assert_allclose(narrow.astype(jnp.float32), wanted, rtol=0, atol=0.15)
