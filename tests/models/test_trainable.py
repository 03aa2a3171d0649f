"""Trained subsets of the parameters, and the outputs of layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilations import compilations
from quick_options import QUICK
from trees import assert_trees_close, assert_trees_equal

from cipo_jax.data.batches import PadShape, TokenizedExample, collate
from cipo_jax.errors import UserError
from cipo_jax.models.decoder import (
    Compute,
    DecoderConfig,
    LayerKind,
    abstract_params,
    head_matrix,
    hidden_states,
    layer_states,
)
from cipo_jax.models.lora import Lora, abstract_adapters, merge
from cipo_jax.models.lora import assemble as with_adapters
from cipo_jax.models.trainable import ParamSubset, abstract_trainable, assemble
from cipo_jax.ops.rope import Rope
from cipo_jax.training.mesh import make_mesh, param_shardings
from cipo_jax.training.objective import Objective
from cipo_jax.training.policy import Policy
from cipo_jax.training.step import TrainStep

CONFIG = DecoderConfig(
    vocab_size=48, d_model=16, d_ff=24, layers=3, heads=4, kv_heads=2, head_dim=6, tied_head=False
)
# The lowest layers are of one kind, so that a cut after them has fewer kinds than the whole.
MIXED = dataclasses.replace(
    CONFIG,
    layer_kinds=(LayerKind(window=3), LayerKind(window=3), LayerKind(Rope(100.0), window=2)),
)
NO_ROPE_FIRST = dataclasses.replace(
    CONFIG, layer_kinds=(LayerKind(None), LayerKind(Rope(100.0), window=2), LayerKind(window=4))
)
KINDS = {"one kind": CONFIG, "mixed": MIXED, "no rope first": NO_ROPE_FIRST}
LORA = Lora(rank=3, alpha=6.0)
SUBSET = ParamSubset((0, 2), ("o_proj", "down_proj"))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 9)), jnp.int32)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def random_tree(abstract, seed=0):
    """None at its trivial value: scales near 1."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        noise = rng.normal(scale=0.3, size=leaf.shape)
        return jnp.asarray(noise + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, abstract)


BASE = random_tree(abstract_params(CONFIG))
ADAPTERS = random_tree(abstract_adapters(CONFIG, LORA), seed=1)


# ---- a subset as a config asks for it


EIGHT = dataclasses.replace(CONFIG, layers=8)


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ((5, 6, 7), (5, 6, 7)),
        ((0, 3), (0, 3)),
        ((2,), (2,)),
        ((3, 0, 1), (0, 1, 3)),
        ((4, 2, 4, 1, 2), (1, 2, 4)),
        (range(8), tuple(range(8))),
    ],
)
def test_layers_are_kept_once_and_in_order(layers, wanted):
    found = ParamSubset.from_config(layers, ("down_proj",), EIGHT, "here")
    assert found == ParamSubset(wanted, ("down_proj",))
    assert hash(found) == hash(ParamSubset(wanted, ("down_proj",)))


def test_target_modules_are_kept_once_and_in_the_order_of_the_model():
    found = ParamSubset.from_config((1,), ("down_proj", "q_proj", "q_proj"), EIGHT, "here")
    assert found.target_modules == ("q_proj", "down_proj")


@pytest.mark.parametrize("layers", [(8,), (5, 6, 7, 8), (), (-1,), (0, -1)])
def test_layers_that_the_model_does_not_have(layers):
    with pytest.raises(UserError) as error:
        ParamSubset.from_config(layers, ("down_proj",), EIGHT, "config.representation")
    wanted = f"config.representation.layers = {layers!r}: the model has layers 0 to 7"
    assert str(error.value) == wanted


def test_target_modules_that_do_not_exist():
    with pytest.raises(
        UserError, match=r"^here\.target_modules: 'down' is not a projection; .*down_proj$"
    ):
        ParamSubset.from_config((1,), ("q_proj", "down"), EIGHT, "here")
    with pytest.raises(UserError, match=r"^here\.target_modules is empty; .*down_proj$"):
        ParamSubset.from_config((1,), (), EIGHT, "here")


# ---- take and put


def elsewhere(params):
    """The whole tree, with zeros where `SUBSET` is."""
    zeros = jax.tree.map(jnp.zeros_like, SUBSET.take(params))
    return SUBSET.put(params, zeros)


def test_the_trained_tree_has_the_chosen_kernels_of_the_chosen_layers():
    taken = SUBSET.take(BASE)
    block = BASE["layers"]["block"]
    wanted = {n: {"kernel": block[n]["kernel"][np.array([0, 2])]} for n in ("o", "down")}
    assert_trees_equal(taken, {"layers": {"block": wanted}})
    abstract = abstract_trainable(CONFIG, SUBSET)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), taken
    )


def test_put_changes_the_trained_kernels_and_nothing_else():
    assert_trees_equal(SUBSET.put(BASE, SUBSET.take(BASE)), BASE)
    other = jax.tree.map(lambda x: x + 1.0, SUBSET.take(BASE))
    changed = SUBSET.put(BASE, other)
    assert_trees_equal(SUBSET.take(changed), other)
    assert_trees_equal(elsewhere(changed), elsewhere(BASE))
    for name in ("o", "down"):
        kernel = BASE["layers"]["block"][name]["kernel"]
        np.testing.assert_array_equal(changed["layers"]["block"][name]["kernel"][1], kernel[1])
    assert_trees_equal(assemble(SUBSET, BASE, other), changed)
    assert_trees_equal(assemble(None, {}, BASE), BASE)


def test_trained_kernels_keep_their_precision_beside_a_narrow_base():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    trained = SUBSET.take(BASE)
    whole = SUBSET.put(narrow, trained)
    assert_trees_equal(SUBSET.take(whole), trained)
    assert whole["embed"].dtype == whole["layers"]["block"]["q"]["kernel"].dtype == jnp.bfloat16


def test_the_trained_tree_is_sharded_like_the_whole():
    mesh = make_mesh(2, 2, 2)
    whole = param_shardings(abstract_params(CONFIG), mesh)["layers"]["block"]
    part = param_shardings(abstract_trainable(CONFIG, SUBSET), mesh)["layers"]["block"]
    assert part == {name: {"kernel": whole[name]["kernel"]} for name in ("o", "down")}


# ---- an update


@dataclasses.dataclass(frozen=True)
class MeanSine(Objective):
    def __call__(self, policy, params, batch, context=None):
        hidden = hidden_states(policy.config, policy.compute, params, batch["tokens"])
        return jnp.mean(jnp.sin(hidden @ head_matrix(policy.config, params))), {}


def test_an_update_changes_the_chosen_kernels_alone(one_device):
    decayed = optax.adamw(1e-2, weight_decay=0.5)  # Would move everything that it can reach.
    policy = Policy(CONFIG, Compute())
    step = TrainStep(policy, MeanSine(), decayed, one_device, trainable=SUBSET)
    state = step.init(SUBSET.take(BASE))
    frozen = jax.device_put(BASE, param_shardings(BASE, one_device))
    with compilations("_update") as compiled:
        for _ in range(2):
            state, metrics = step(state, step.put({"tokens": TOKENS}), frozen)
    assert compiled.number == 1
    assert_trees_equal(frozen, BASE)
    whole = assemble(SUBSET, frozen, state.params)
    assert_trees_equal(elsewhere(whole), elsewhere(BASE))
    for before, after in zip(
        jax.tree.leaves(SUBSET.take(BASE)), jax.tree.leaves(state.params), strict=True
    ):
        assert np.abs(after - before).max(axis=tuple(range(1, before.ndim))).min() > 1e-3
    # The optimizer keeps moments of the chosen kernels alone.
    trained = sum(x.size for x in jax.tree.leaves(SUBSET.take(BASE)))
    numbers = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert numbers == 3 * trained
    assert metrics["grad_norm"] > 1e-3


def test_the_gradient_is_that_of_the_whole_model():
    policy, batch, loss = Policy(CONFIG, Compute()), {"tokens": TOKENS}, MeanSine()

    @jax.jit
    def both(taken):
        whole = jax.grad(lambda p: loss(policy, p, batch)[0])(BASE)
        return jax.grad(lambda t: loss(policy, assemble(SUBSET, BASE, t), batch)[0])(taken), whole

    found, whole = both(SUBSET.take(BASE))
    assert min(float(np.abs(x).max()) for x in jax.tree.leaves(found)) > 1e-4
    # Another order of the same f32 sums.
    assert_trees_close(found, SUBSET.take(whole), atol=1e-7)


# ---- the output of a layer


def norm(x, scale):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rotated(x, rope):
    """[B, T, heads, H], by halves, as Llama does it."""
    if rope is None:
        return x
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), rope.theta ** (-np.arange(half) / half))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    left, right = x[..., :half], x[..., half:]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attended(q, k, v, window):
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    ago = np.subtract.outer(np.arange(q.shape[1]), np.arange(q.shape[1]))
    seen = (ago >= 0) & (ago < (window or q.shape[1]))
    weights = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(np.where(seen, weights, -np.inf))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def plain_layers(config, params):
    """The output of each layer, in float64."""
    params = jax.tree.map(np.float64, params)
    x, found = params["embed"][np.asarray(TOKENS)], []
    for i in range(config.layers):
        w = jax.tree.map(lambda a, i=i: a[i], params["layers"]["block"])
        kind = config.layer_kinds[i % len(config.layer_kinds)]
        h = norm(x, w["attn_norm"]["scale"])
        q, k, v = (np.einsum("btd,dhk->bthk", h, w[n]["kernel"]) for n in "qkv")
        h = attended(rotated(q, kind.rope), rotated(k, kind.rope), v, kind.window)
        x = x + np.einsum("bthk,hkd->btd", h, w["o"]["kernel"])
        h = norm(x, w["mlp_norm"]["scale"])
        gate, up = (h @ w[n]["kernel"] for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down"]["kernel"]
        found.append(x)
    return found


def all_layers(config, params):
    """The output of each layer by `layer_states`, and the final hidden states."""

    @jax.jit(compiler_options=QUICK)
    def everything(params):
        each = [layer_states(config, Compute(), params, TOKENS, i) for i in range(config.layers)]
        return each, hidden_states(config, Compute(), params, TOKENS)

    return everything(params)


@pytest.mark.parametrize(
    ("kind", "lora"), [*((kind, False) for kind in KINDS), ("no rope first", True)]
)
def test_layer_outputs_are_those_of_a_plain_computation(kind, lora):
    config = KINDS[kind]
    params = with_adapters(LORA, BASE, ADAPTERS) if lora else BASE
    wanted = plain_layers(config, merge(LORA, BASE, ADAPTERS) if lora else BASE)
    found, last = all_layers(config, params)
    for layer, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert np.std(b) > 0.5
        # f32 sums of numbers of order 1.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=f"layer {layer}")
    # Layer outputs are not normed; the final hidden states are.
    normed = norm(wanted[-1], np.float64(BASE["final_norm"]["scale"]))
    np.testing.assert_allclose(last, normed, rtol=1e-4, atol=1e-4)
    assert np.abs(found[-1] - last).max() > 0.1


def test_kinds_and_adapters_make_a_difference():
    """The test above would not see a cut that takes the wrong kinds if they did not."""
    whole = merge(LORA, BASE, ADAPTERS)
    for one, two in (
        (plain_layers(CONFIG, BASE), plain_layers(MIXED, BASE)),
        (plain_layers(NO_ROPE_FIRST, BASE), plain_layers(MIXED, BASE)),
        (plain_layers(MIXED, BASE), plain_layers(MIXED, whole)),
    ):
        assert min(np.abs(a - b).max() for a, b in zip(one, two, strict=True)) > 0.05


def test_a_loss_on_a_layer_reaches_nothing_above_it():
    layer = 1

    def on_layer(params):
        states = layer_states(NO_ROPE_FIRST, Compute(remat="full"), params, TOKENS, layer)
        return jnp.mean(jnp.sin(states))

    adapted = with_adapters(LORA, BASE, ADAPTERS)
    gradient = jax.jit(jax.grad(on_layer), compiler_options=QUICK)(adapted)
    base = gradient["base"]
    for tree in (base, gradient["lora"]):
        for path, x in jax.tree_util.tree_leaves_with_path(tree["layers"]):
            where = jax.tree_util.keystr(path)
            assert (np.abs(x[: layer + 1]).reshape(layer + 1, -1).max(axis=1) > 0).all(), where
            assert not np.any(x[layer + 1 :]), where
    assert np.any(base["embed"])
    assert not np.any(base["head"]) and not np.any(base["final_norm"]["scale"])


def test_layer_states_of_a_policy_are_at_the_completion_tokens():
    rows = [TokenizedExample([1, 2, 3], [4, 5]), TokenizedExample([6], [7, 8, 9])]
    sequences = collate(rows, PadShape(6, 4))
    policy = Policy(MIXED, Compute())

    @jax.jit
    def both(params, sequences):
        whole = layer_states(MIXED, Compute(), params, jnp.asarray(sequences.tokens), 1)
        last = hidden_states(MIXED, Compute(), params, jnp.asarray(sequences.tokens))
        found = policy.layer_states(params, sequences, 1)
        return found, whole, policy.completion_states(params, sequences), last

    found, whole, predicting, last = (np.asarray(x) for x in both(BASE, sequences))
    for i, row in enumerate(rows):
        start, length = len(row.prompt), len(row.completion)
        np.testing.assert_allclose(found[i, :length], whole[i, start : start + length], atol=1e-6)
        before = last[i, start - 1 : start - 1 + length]
        np.testing.assert_allclose(predicting[i, :length], before, atol=1e-6)
