import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_trees_close, assert_trees_equal

from cipo_jax.data.batches import PadShape, TokenizedExample, collate
from cipo_jax.errors import UserError
from cipo_jax.language_model import LanguageModel, TextPair
from cipo_jax.methods.cipo.objective import PreferenceObjective
from cipo_jax.models.lora import Lora
from cipo_jax.models.pretrained import PretrainedFolder
from cipo_jax.models.trainable import ParamSubset
from cipo_jax.sampling import Sampler, SamplingJob
from cipo_jax.shared_config import ModelConfig, ThinkConfig
from cipo_jax.training.mesh import make_mesh
from cipo_jax.training.optimizer import AdamW, Schedule

pytestmark = pytest.mark.usefixtures("quick_compilation")

ASSET = "asset:tiny_lrm/target"
LORA = Lora(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"))
DPO = PreferenceObjective("dpo", beta=0.1)
QUESTION = "What is 17 + 25?"
PAIRS = (
    TextPair(QUESTION, ("17+25: 7+5=12, 1+2+1=4, 42.", "42"), ("17+25: 43.", "43")),
    TextPair("What is 8 + 4?", ("8+4=12, 12.", "12"), ("8+4=13, 13.", "13")),
)


def one_device_mesh():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def model():
    return LanguageModel.from_pretrained(ASSET, one_device_mesh())


@pytest.fixture(scope="module")
def batch(model):
    return model.pair_batch(PAIRS)


@pytest.fixture(scope="module")
def trained(model, batch):
    """Parameters after one DPO step."""
    step = model.train_step(DPO, optax.adam(1e-3))
    return step(step.init(model.init_trainable()), batch)[0].params


@pytest.fixture(scope="module")
def adapted(batch):
    """A model with adapters, and the adapters after two DPO steps."""
    model = LanguageModel.from_pretrained(ASSET, one_device_mesh(), lora=LORA)
    step = model.train_step(DPO, optax.adam(1e-2))
    state = step.init(model.init_trainable())
    for _ in range(2):  # In the first step half of the gradients are zero, since b is.
        state, _ = step(state, batch, model.base_params)
    return model, state.params


def logps_of(model, params, batch):
    return policy_logps(model, params, batch["pairs"].flattened())


def policy_logps(model, params, rows):
    return np.asarray(model.policy.completion_logps(params, jax.tree.map(jnp.asarray, rows)))


# ---- opening


def test_opening_reads_config_and_tokenizer_but_no_weights(monkeypatch):
    def load(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(PretrainedFolder, "load_params", load)
    model = LanguageModel.from_pretrained(ASSET, one_device_mesh(), lora=LORA)
    assert model.config == model.pretrained.config
    assert model.chat.stop_ids == model.pretrained.stop_ids
    assert model.trainable == LORA
    jax.tree.map(lambda x: x.shape, model.abstract_trainable())
    with pytest.raises(AssertionError, match="weights were read"):
        _ = model.base_params


def test_by_default_the_mesh_has_all_devices_along_data():
    mesh = LanguageModel.from_pretrained(ASSET).mesh
    assert dict(mesh.shape) == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        LanguageModel.from_pretrained(tmp_path / "nowhere")


def test_a_mesh_that_does_not_divide_the_model_is_an_error():
    mesh = make_mesh(1, 1, 8)  # The asset has 2 key heads.
    with pytest.raises(UserError, match=r"config\.mesh\.tensor = 8"):
        LanguageModel.from_pretrained(ASSET, mesh)


def test_from_config_takes_numerics_and_prompt():
    config = ModelConfig(ASSET, dtype="bfloat16", decode_dtype="float32", remat="full")
    think = ThinkConfig(prompt="Q: {question}")
    model = LanguageModel.from_config(config, think, one_device_mesh())
    assert (model.compute.dtype, model.compute.remat) == ("bfloat16", "full")
    assert model.decode_compute.dtype == "float32"
    assert model.chat.prompt_text("why") == "Q: why"
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(model.base_params))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(model.init_trainable()))


# ---- sampling and scoring


def test_the_sampler_is_that_of_the_parts(model):
    sampling_params = model.sampling_params(48)
    sampler = model.sampler(sampling_params, max_batch_size=2)
    plain = Sampler(model.config, model.decode_compute, model.mesh, 2, 32, False, sampling_params)
    assert sampler == plain
    params = sampler.prepare(model.load_params())
    job = SamplingJob([model.request(QUESTION), model.request(QUESTION, 1, prefill="17+25")])
    (first,), (second,) = sampler.sample(params, job)
    assert model.chat.split(first.ids).answer == model.chat.split(second.ids).answer == "42"
    assert first.stop == "id"
    assert second.item == 1
    assert model.chat.text_of(first.ids).startswith("17+25")
    assert not model.chat.text_of(second.ids).startswith("17+25")


def test_a_batch_that_does_not_fit_into_memory_is_refused(model):
    with pytest.raises(UserError, match="rows = 1000000000 does not fit"):
        model.sampler(max_batch_size=10**9, setting="rows")
    model.sampler(max_batch_size=8)
    # The plan is for as many tokens as the sampling parameters allow.
    with pytest.raises(UserError, match="max_batch_size = 8 does not fit"):
        model.sampler(model.sampling_params(10**8), max_batch_size=8)


def test_the_plan_counts_weights_that_are_resident_beside_it(model, adapted):
    arguments = (4, 32, 32)
    alone = model.plan_sampler(*arguments)
    beside = model.plan_sampler(*arguments, beside_training=True)
    params = sum(x.nbytes for x in jax.tree.leaves(model.load_params()))
    assert (alone.resident, beside.resident) == (0, params)
    narrow = dataclasses.replace(
        adapted[0], compute=dataclasses.replace(adapted[0].compute, dtype="bfloat16")
    )
    assert narrow.plan_sampler(*arguments, beside_training=True).resident == params // 2


def test_the_scorer_gives_the_log_probabilities_of_the_policy(model):
    chat = model.chat
    rows = [
        TokenizedExample(chat.prompt_ids(question), chat.completion_ids(*chosen))
        for question, chosen, _ in PAIRS
    ]
    shape = PadShape.fitting(rows)
    found = model.scorer(max_batch_size=1).token_logps(model.params, rows, shape)
    wanted = policy_logps(model, model.params, collate(rows, shape))
    for row, logps, whole in zip(rows, found, wanted, strict=True):
        np.testing.assert_allclose(logps, whole[: len(row.completion)], atol=1e-5)


# ---- pairs


def test_a_batch_of_pairs_has_completions_and_reference(model, batch):
    pairs, chat = batch["pairs"], model.chat
    assert pairs.tokens.shape[:2] == (2, 2)
    for i, (question, *sides) in enumerate(PAIRS):
        prompt = chat.prompt_ids(question)
        for side, (cot, answer) in enumerate(sides):
            wanted = chat.completion_ids(cot, answer)
            length, start = pairs.lengths[i, side], pairs.prompt_lengths[i, side]
            assert pairs.completions[i, side, :length].tolist() == wanted
            assert pairs.tokens[i, side, : start + length].tolist() == [*prompt, *wanted]
    logps = logps_of(model, model.params, batch).reshape(2, 2, -1)
    sums = np.where(pairs.mask, logps, 0.0).sum(-1)
    np.testing.assert_allclose(batch["ref"], sums, atol=1e-4)


def test_pairs_may_be_plain_tuples_with_another_reference_and_shape(model, batch, trained):
    shape = PadShape(128, 64)
    found = model.pair_batch([tuple(pair) for pair in PAIRS], trained, shape=shape)
    assert found["pairs"].tokens.shape == (2, 2, 128)
    assert found["pairs"].completions.shape == (2, 2, 64)
    np.testing.assert_array_equal(found["pairs"].lengths, batch["pairs"].lengths)
    assert np.abs(found["ref"] - batch["ref"]).min() > 1e-3


def test_pairs_that_are_missing_or_too_long_are_errors(model):
    with pytest.raises(ValueError, match="no pairs"):
        model.pair_batch([])
    with pytest.raises(ValueError):
        model.pair_batch(PAIRS, shape=PadShape(16, 4))


def test_any_number_of_pairs_trains_on_any_number_of_devices(model, batch):
    states = []
    for mesh in (one_device_mesh(), make_mesh(4, 2, 1)):
        own = dataclasses.replace(model, mesh=mesh)
        step = own.train_step(DPO, optax.sgd(1e-3))
        state, metrics = step(step.init(own.load_params()), own.pair_batch(PAIRS))
        assert abs(float(metrics["loss"]) - math.log(2)) < 1e-4
        states.append(state.params)
    assert_trees_close(states[1], states[0], atol=1e-5)


# ---- training


def test_optax_and_the_optimizer_of_this_package_train_alike(model, batch, trained):
    step = model.train_step(DPO, AdamW(0.9, 0.999, max_grad_norm=0.0))
    state = step.init(model.init_trainable(), schedule=Schedule(lr=1e-3))
    state, metrics = step(state, step.put(batch))
    assert abs(float(metrics["loss"]) - math.log(2)) < 1e-4
    assert_trees_close(state.params, trained, atol=1e-5)
    _, metrics = step(state, step.put(batch))
    assert float(metrics["loss"]) < 0.6
    assert float(metrics["rewards/margins"]) > 0.0


def test_settings_of_a_train_step_arrive(model, adapted):
    step = model.train_step(DPO, AdamW(), gradient_accumulation_steps=2, ema_decay=0.9)
    assert (step.gradient_accumulation_steps, step.ema_decay) == (2, 0.9)
    assert step == model.train_step(DPO, AdamW(), gradient_accumulation_steps=2, ema_decay=0.9)
    dropping = adapted[0].with_trainable(dataclasses.replace(LORA, dropout=0.1))
    step = dropping.train_step(DPO, AdamW())
    assert step.policy.compute.lora_dropout == 0.1
    assert dropping.policy.compute.lora_dropout == 0.0


def test_fresh_adapters_change_nothing_and_trained_ones_do(model, adapted, batch):
    own, params = adapted
    shapes = own.abstract_trainable()
    jax.tree.map(lambda x, s: np.testing.assert_equal(x.shape, s.shape), params, shapes)
    before = logps_of(own, own.params, batch)
    np.testing.assert_allclose(before, logps_of(model, model.params, batch), atol=1e-5)
    after = logps_of(own, own.assemble(params), batch)
    assert np.abs(after - before).max() > 1e-2
    assert_trees_equal(own.base_params, model.load_params())
    with pytest.raises(ValueError, match="frozen"):
        step = own.train_step(DPO, optax.adam(1e-2))
        step(step.init(own.init_trainable()), batch)


def test_the_key_decides_fresh_adapters(adapted):
    own = adapted[0]
    assert_trees_equal(own.init_trainable(), own.init_trainable(jax.random.key(0)))
    differ = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)),
        own.init_trainable(),
        own.init_trainable(jax.random.key(1)),
    )
    assert any(jax.tree.leaves(differ))


def test_a_subset_of_the_parameters_is_trained(model, batch):
    subset = ParamSubset.from_config((1,), ("down_proj",), model.config, "test")
    own = model.with_trainable(subset)
    step = own.train_step(DPO, optax.sgd(1e-1))
    state, _ = step(step.init(own.init_trainable()), batch, own.base_params)
    whole = own.assemble(state.params)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), whole, model.load_params())
    paths = jax.tree_util.tree_leaves_with_path(changed)
    names = [jax.tree_util.keystr(path) for path, differs in paths if differs]
    assert len(names) == 1 and "down" in names[0]


# ---- saving


def test_a_saved_model_comes_back_as_it_was(model, trained, tmp_path):
    model.save(tmp_path / "out", trained)
    again = LanguageModel.from_pretrained(tmp_path / "out", model.mesh)
    assert again.config == model.config
    assert again.chat.prompt_ids(QUESTION) == model.chat.prompt_ids(QUESTION)
    assert again.chat.stop_ids == model.chat.stop_ids
    assert_trees_equal(again.load_params(), trained)
    assert again.fingerprint != model.fingerprint


def test_by_default_the_model_before_training_is_saved(model, tmp_path):
    model.save(tmp_path / "out", dtype="bfloat16")
    again = LanguageModel.from_pretrained(tmp_path / "out", model.mesh)
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.load_params())
    assert_trees_equal(again.load_params("bfloat16"), wanted)


def test_adapters_are_saved_merged_or_alone(adapted, batch, tmp_path):
    own, params = adapted
    wanted = logps_of(own, own.assemble(params), batch)
    own.save(tmp_path / "merged", params)
    merged = LanguageModel.from_pretrained(tmp_path / "merged", own.mesh)
    np.testing.assert_allclose(logps_of(merged, merged.params, batch), wanted, atol=1e-4)

    own.save(tmp_path / "adapter", params, form="adapter")
    again = LanguageModel.from_pretrained(ASSET, own.mesh, lora=str(tmp_path / "adapter"))
    assert again.trainable == LORA
    assert_trees_equal(again.init_trainable(), params)
    np.testing.assert_array_equal(logps_of(again, again.params, batch), wanted)
    assert again.fingerprint != own.fingerprint


def test_a_model_without_adapters_has_none_to_save(model, tmp_path):
    with pytest.raises(UserError, match="no adapters to save"):
        model.save(tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()
