import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilations import compilations
from trees import assert_trees_close, assert_trees_equal

from cipo_jax.data.tiny_tokenizer import train_tokenizer
from cipo_jax.errors import UserError
from cipo_jax.models.decoder import (
    Compute,
    DecoderConfig,
    abstract_params,
    decoding_layout,
    head_matrix,
    hidden_states,
    layer_states,
    merged,
)
from cipo_jax.models.hf_config import read_config
from cipo_jax.models.lora import (
    TARGETS,
    Lora,
    abstract_adapters,
    assemble,
    init_adapters,
    load_adapters,
    merge,
    read_lora,
    save_adapters,
)
from cipo_jax.models.safetensors_load import load_params
from cipo_jax.models.safetensors_save import save_folder
from cipo_jax.shared_config import LoraConfig
from cipo_jax.training.mesh import make_mesh, param_shardings
from cipo_jax.training.objective import Objective
from cipo_jax.training.policy import Policy
from cipo_jax.training.step import TrainStep

# Every branch that an adapter meets: biases, GQA, heads wider than d_model / heads.
CONFIG = DecoderConfig(
    vocab_size=300, d_model=24, d_ff=40, layers=3, heads=4, kv_heads=2, head_dim=10,
    tied_head=False, qkv_bias=True, o_bias=True, mlp_bias=True,
)  # fmt: skip
LORA = Lora(rank=4, alpha=6.0)
PLAIN = Compute()
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 9)), jnp.int32)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def random_tree(abstract, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(scale=scale, size=x.shape), jnp.float32), abstract
    )


def random_adapters(lora=LORA, config=CONFIG, seed=1):
    return random_tree(abstract_adapters(config, lora), seed)


@pytest.fixture(scope="module")
def base():
    return random_tree(abstract_params(CONFIG))


# Compiled once for each structure of params, since running the layers one by one takes far longer.
@functools.partial(jax.jit, static_argnums=1)
def logits(params, compute=PLAIN, tokens=TOKENS, dropout_key=None):
    hidden = hidden_states(CONFIG, compute, params, tokens, dropout_key=dropout_key)
    return hidden @ head_matrix(CONFIG, params)


def test_fresh_adapters_change_nothing(base):
    fresh = init_adapters(CONFIG, LORA, jax.random.key(3))
    np.testing.assert_array_equal(logits(assemble(LORA, base, fresh)), logits(base))
    for x in jax.tree.leaves(fresh["layers"]["block"]["q"]["a"]):
        bound = CONFIG.d_model**-0.5
        assert 0.9 * bound < np.abs(x).max() <= bound
    assert not np.array_equal(
        fresh["layers"]["block"]["q"]["a"], fresh["layers"]["block"]["gate"]["a"][..., :4]
    )


@pytest.mark.parametrize("target_modules", [TARGETS, ("q_proj", "down_proj"), ("o_proj",)])
def test_merged_weights_give_the_logits_of_adapters(base, target_modules):
    lora = dataclasses.replace(LORA, target_modules=target_modules)
    adapters = random_adapters(lora)
    params = assemble(lora, base, adapters)
    found, whole = logits(params), merge(lora, base, adapters)
    assert np.max(np.abs(found - logits(base))) > 0.1
    np.testing.assert_allclose(found, logits(whole), rtol=0, atol=2e-4)
    layout = jax.jit(decoding_layout, static_argnums=(0, 2))
    assert_trees_close(
        layout(CONFIG, params, "float32"), layout(CONFIG, whole, "float32"), atol=1e-6
    )


def test_the_scale_of_an_adapter_is_alpha_over_rank(base):
    adapters = random_adapters()
    change = merge(LORA, base, adapters)["layers"]["block"]["gate"]["kernel"]
    change = np.asarray(change - base["layers"]["block"]["gate"]["kernel"], np.float64)
    pair = adapters["layers"]["block"]["gate"]
    product = np.einsum("ldr,lrf->ldf", np.float64(pair["a"]), np.float64(pair["b"]))
    np.testing.assert_allclose(change, product * 6.0 / 4, rtol=0, atol=1e-5)
    stabilized = dataclasses.replace(LORA, rank_stabilized=True)
    assert stabilized.scale == pytest.approx(6.0 / 2)


def test_gradients_are_those_of_the_merged_weights(base):
    """d/db of f(W + w a b) = w a' f'(W), and d/da = w f'(W) b', by the chain rule."""
    adapters = random_adapters()

    def loss(params):
        return jnp.mean(jnp.sin(logits(params)))

    found = jax.jit(jax.grad(lambda x: loss(assemble(LORA, base, x))))(adapters)
    whole = jax.jit(jax.grad(loss))(merge(LORA, base, adapters))["layers"]["block"]
    for name, inputs in (("q", 1), ("o", 2), ("down", 1)):
        pair, got = adapters["layers"]["block"][name], found["layers"]["block"][name]
        kernel = np.float64(whole[name]["kernel"])
        layers = kernel.shape[0]
        flat = kernel.reshape(layers, int(np.prod(kernel.shape[1 : 1 + inputs])), -1)
        a = np.float64(pair["a"]).reshape(layers, flat.shape[1], -1)
        b = np.float64(pair["b"]).reshape(layers, -1, flat.shape[2])
        wanted = {
            "a": np.einsum("lio,lro->lir", flat, b) * LORA.scale,
            "b": np.einsum("lio,lir->lro", flat, a) * LORA.scale,
        }
        for part, value in wanted.items():
            assert np.abs(value).max() > 1e-4
            np.testing.assert_allclose(
                np.asarray(got[part]).reshape(value.shape), value, rtol=2e-3, atol=1e-6
            )


def test_dropout_hits_the_adapters_inputs_in_training_alone(base):
    lora = dataclasses.replace(LORA, dropout=0.5)
    adapters, compute = random_adapters(lora), Compute(lora_dropout=0.5)
    plain = logits(assemble(lora, base, adapters))

    def dropped(seed, tokens=TOKENS):
        params = assemble(lora, base, adapters)
        return logits(params, compute, tokens, jax.random.key(seed))

    np.testing.assert_array_equal(dropped(0), dropped(0))
    assert np.max(np.abs(dropped(0) - dropped(1))) > 0.1
    assert np.max(np.abs(dropped(0) - plain)) > 0.1
    # Without a dropout rate or without a key, as in scoring and sampling, nothing is dropped.
    params, key = assemble(lora, base, adapters), jax.random.key(0)
    np.testing.assert_array_equal(logits(params, dropout_key=key), plain)
    np.testing.assert_array_equal(logits(params, compute), plain)
    # Rows of different batches have different masks.
    other = TOKENS.at[1, -1].set((TOKENS[1, -1] + 1) % CONFIG.vocab_size)
    assert np.max(np.abs(dropped(0)[0] - dropped(0, other)[0])) > 0.1
    nothing = assemble(lora, base, jax.tree.map(jnp.zeros_like, adapters))
    np.testing.assert_array_equal(
        logits(nothing, compute, dropout_key=key), logits(base, compute, dropout_key=key)
    )


@pytest.mark.parametrize("layer", [0, 2])
def test_layer_states_have_dropout_too(base, layer):
    lora, compute = dataclasses.replace(LORA, dropout=0.5), Compute(lora_dropout=0.5)
    params = assemble(lora, base, random_adapters(lora))

    @jax.jit
    def states(key):
        return layer_states(CONFIG, compute, params, TOKENS, layer, dropout_key=key)

    plain, one, two = states(None), states(jax.random.key(0)), states(jax.random.key(1))
    np.testing.assert_array_equal(one, states(jax.random.key(0)))
    assert np.max(np.abs(one - plain)) > 0.01
    assert np.max(np.abs(one - two)) > 0.01
    if layer == CONFIG.layers - 1:
        normed = one / np.sqrt(np.mean(np.square(one), -1, keepdims=True) + CONFIG.norm_eps)
        hidden = hidden_states(CONFIG, compute, params, TOKENS, dropout_key=jax.random.key(0))
        np.testing.assert_allclose(normed * base["final_norm"]["scale"], hidden, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class MeanSine(Objective):
    def __call__(self, policy, params, batch, context):
        hidden = hidden_states(
            policy.config,
            policy.compute,
            params,
            batch["tokens"],
            dropout_key=policy.dropout_key,
        )
        return jnp.mean(jnp.sin(hidden @ head_matrix(policy.config, params))), {}


def stepped(mesh, base, adapters, steps=3, lora=LORA, seed=0):
    policy = Policy(CONFIG, Compute(remat="names"))
    step = TrainStep(policy, MeanSine(), optax.adamw(1e-2), mesh, trainable=lora)
    state = step.init(adapters)
    frozen = jax.device_put(base, param_shardings(base, mesh))
    batch = step.put({"tokens": np.tile(TOKENS, (4, 1))})
    with compilations("_update") as compiled:
        for _ in range(steps):
            state, metrics = step(state, batch, frozen, jax.random.key(seed))
    assert compiled.number == 1
    return state, frozen, metrics


def test_an_update_moves_adapters_and_nothing_else(base, one_device):
    adapters = init_adapters(CONFIG, LORA, jax.random.key(0))
    state, frozen, metrics = stepped(one_device, base, adapters)
    assert_trees_equal(frozen, base)
    assert jax.tree.structure(state.params) == jax.tree.structure(adapters)
    for before, after in zip(jax.tree.leaves(adapters), jax.tree.leaves(state.params), strict=True):
        assert np.max(np.abs(before - after)) > 0
    # Nothing of the base's size is in the state: not as parameters, not as the optimizer's moments.
    trained = sum(x.size for x in jax.tree.leaves(adapters))
    assert sum(x.size for x in jax.tree.leaves(state)) == 3 * trained + 2
    assert float(metrics["grad_norm"]) > 0


def test_eight_devices_train_what_one_does(base, one_device):
    adapters = random_adapters()
    one, _, _ = stepped(one_device, base, adapters)
    eight, _, _ = stepped(make_mesh(2, 2, 2), base, adapters)
    assert_trees_close(eight, one, atol=2e-4)
    q = eight.params["layers"]["block"]["q"]
    assert len({str(s.index) for s in q["a"].addressable_shards}) == 2
    assert len({str(s.index) for s in q["b"].addressable_shards}) == 2


def test_dropout_differs_between_steps_and_repeats_with_the_seed(base, one_device):
    lora, adapters = dataclasses.replace(LORA, dropout=0.5), random_adapters()
    runs = [stepped(one_device, base, adapters, 2, lora, seed=seed)[0].params for seed in (1, 1, 2)]
    assert_trees_equal(runs[0], runs[1])
    moved = [jax.tree.leaves(run)[0] for run in runs]
    assert np.max(np.abs(moved[0] - moved[2])) > 1e-4


def test_saving_and_loading_is_bit_identical_on_any_mesh(tmp_path):
    adapters = random_adapters()
    save_adapters(tmp_path / "adapter", CONFIG, LORA, adapters, "somewhere/base")
    assert read_lora(tmp_path / "adapter") == LORA
    assert_trees_equal(load_adapters(tmp_path / "adapter", CONFIG, LORA), adapters)
    shardings = param_shardings(abstract_adapters(CONFIG, LORA), make_mesh(2, 2, 2))
    placed = load_adapters(tmp_path / "adapter", CONFIG, LORA, shardings)
    assert_trees_equal(placed, adapters)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    save_adapters(tmp_path / "again", CONFIG, LORA, placed, "somewhere/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        one, two = (tmp_path / folder / name for folder in ("adapter", "again"))
        assert one.read_bytes() == two.read_bytes()


@pytest.fixture
def torch_base(tmp_path, base):
    """A torch model with the weights of `base`, and the folder that it was read from."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = dataclasses.replace(CONFIG, qkv_bias=True, o_bias=True, mlp_bias=True)
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300,
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
        "rms_norm_eps": 1e-6, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": False, "rope_theta": 10000.0, "max_position_embeddings": 64,
    }  # fmt: skip
    tokenizer = train_tokenizer(["Who wrote The Sea?"], 280)
    save_folder(tmp_path / "base", config, base, tokenizer, fields)
    assert read_config(tmp_path / "base") == CONFIG
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), tmp_path / "base"


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.array(TOKENS)).long()).logits.numpy()


@pytest.mark.parametrize("target_modules", [TARGETS, ("q_proj", "v_proj")])
@pytest.mark.parametrize("stabilized", [False, True])
def test_peft_reads_our_adapters(torch_base, base, tmp_path, target_modules, stabilized):
    from peft import PeftModel

    lora = dataclasses.replace(LORA, target_modules=target_modules, rank_stabilized=stabilized)
    adapters = random_adapters(lora)
    save_adapters(tmp_path / "adapter", CONFIG, lora, adapters, str(torch_base[1]))
    model = PeftModel.from_pretrained(torch_base[0], tmp_path / "adapter").eval()
    wanted = logits(assemble(lora, base, adapters))
    assert np.max(np.abs(wanted - logits(base))) > 0.1
    np.testing.assert_allclose(torch_logits(model), wanted, rtol=0, atol=1e-4)
    whole = model.merge_and_unload()
    np.testing.assert_allclose(torch_logits(whole), wanted, rtol=0, atol=2e-4)


def test_we_read_the_adapters_of_peft(torch_base, base, tmp_path):
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    settings = PeftConfig(
        r=3, lora_alpha=7, target_modules=["o_proj", "gate_proj", "k_proj"], lora_dropout=0.1,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(torch_base[0], settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.copy_(torch.randn_like(x) * 0.3)
    model.save_pretrained(tmp_path / "theirs")
    lora = read_lora(tmp_path / "theirs")
    assert lora == Lora(3, 7.0, ("k_proj", "o_proj", "gate_proj"), 0.1)
    params = assemble(lora, base, load_adapters(tmp_path / "theirs", CONFIG, lora))
    np.testing.assert_allclose(logits(params), torch_logits(model.eval()), rtol=0, atol=1e-4)
    assert np.max(np.abs(logits(params) - logits(base))) > 0.1
    merged_too = logits(merged(params))
    np.testing.assert_allclose(merged_too, logits(params), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["embed_tokens"]}, "target_modules"),
        ({"target_modules": ".*proj"}, "target_modules"),
        ({"r": "four"}, "four"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path, fields, named):
    save_adapters(tmp_path / "adapter", CONFIG, LORA, random_adapters(), "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError) as error:
        read_lora(tmp_path / "adapter")
    assert named in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    save_adapters(tmp_path / "adapter", CONFIG, LORA, random_adapters(), "base")
    wider = dataclasses.replace(CONFIG, d_ff=48)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.gate_proj\.lora_B\.weight has shape"):
        load_adapters(tmp_path / "adapter", wider, LORA)
    fewer = dataclasses.replace(LORA, target_modules=("q_proj",))
    with pytest.raises(UserError, match="is not a tensor of this model"):
        load_adapters(tmp_path / "adapter", CONFIG, fewer)


def test_adapters_of_a_config(tmp_path):
    assert Lora.from_config(LoraConfig()) is None
    settings = LoraConfig(
        rank=8, alpha=4.0, target_modules=("down_proj", "q_proj", "down_proj"), dropout=0.1
    )
    assert Lora.from_config(settings) == Lora(8, 4.0, ("q_proj", "down_proj"), 0.1)
    assert Lora.from_config(LoraConfig(rank=8)).target_modules == TARGETS
    stabilized = LoraConfig(rank=8, rank_stabilized=True)
    assert Lora.from_config(stabilized) == Lora(8, 16.0, rank_stabilized=True)
    with pytest.raises(
        UserError, match=r"^config\.lora\.target_modules: 'query' is not a .*all-linear for all"
    ):
        Lora.from_config(LoraConfig(rank=8, target_modules=("q_proj", "query")))
    with pytest.raises(UserError, match=r"^config\.lora\.target_modules is empty; .*down_proj"):
        Lora.from_config(LoraConfig(rank=8, target_modules=()))
    save_adapters(tmp_path / "adapter", CONFIG, LORA, random_adapters(), "base")
    path = str(tmp_path / "adapter")
    assert Lora.from_config(LoraConfig(path=path)) == LORA
    assert Lora.from_config(LoraConfig(path=path, rank=4, alpha=99.0)) == LORA
    with_dropout = LoraConfig(path=path, dropout=0.2)
    assert Lora.from_config(with_dropout) == dataclasses.replace(LORA, dropout=0.2)
    with pytest.raises(UserError, match=r"config\.lora\.rank = 8: the adapters .* have rank 4"):
        Lora.from_config(LoraConfig(path=path, rank=8))


def test_a_run_export_opens_in_transformers(torch_base, base, tmp_path):
    """Merged and exported, the weights are opened by the other library and say the same."""
    from transformers import AutoModelForCausalLM

    adapters = random_adapters()
    whole = merge(LORA, base, adapters)
    fields = json.loads((torch_base[1] / "config.json").read_text())
    tokenizer = train_tokenizer(["Who wrote The Sea?"], 280)
    save_folder(tmp_path / "merged", CONFIG, whole, tokenizer, fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    wanted = logits(assemble(LORA, base, adapters))
    np.testing.assert_allclose(torch_logits(model), wanted, rtol=0, atol=2e-4)
    assert_trees_equal(load_params(tmp_path / "merged", CONFIG), whole)
