"""Our logits and texts against those of transformers: golden values and, with torch, live."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_decoder_golden import (
    CASES,
    GOLDEN,
    LOGITS_AT,
    MARGIN,
    NEW,
    VARIED,
    build,
    divergence,
    narrow,
    random_prompts,
    random_tokens,
    torch_greedy,
    torch_logits,
    varied,
)
from one_batch import STOPPED_AT_LENGTH, generate
from quick_options import QUICK
from safetensors.numpy import save_file

from cipo_jax.data.batches import PadShape, TokenizedExample, collate
from cipo_jax.data.tiny_tokenizer import train_tokenizer
from cipo_jax.hub import load_tokenizer
from cipo_jax.models.decoder import (
    Compute,
    LayerKind,
    decoding_layout,
    head_matrix,
    hidden_states,
)
from cipo_jax.models.hf_config import read_config
from cipo_jax.models.safetensors_load import load_params
from cipo_jax.models.safetensors_save import save_folder
from cipo_jax.ops.rope import Rope
from cipo_jax.sampling import SamplingParams
from cipo_jax.training.policy import Policy

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Float32 on both sides; logits are a few units large and a few dozen roundings deep.
TOLERANCE = 1e-4
SAMPLES = 2


@jax.jit(static_argnums=(0, 1), compiler_options=QUICK)
def logits_of(config, compute, params, tokens):
    hidden = hidden_states(config, compute, params, tokens)
    return jnp.dot(
        hidden, head_matrix(config, params).astype(hidden.dtype), preferred_element_type=jnp.float32
    )


completion_logps = jax.jit(
    lambda policy, params, sequences: policy.completion_logps(params, sequences),
    static_argnums=0,
    compiler_options=QUICK,
)


@jax.jit(static_argnums=0, compiler_options=QUICK)
def greedy(config, params, prompts, lengths):
    """The prompts in one batch, with two equal samples each."""
    return generate(
        config,
        Compute(),
        SamplingParams(NEW, stop_ids=()),
        decoding_layout(config, params, "float32"),
        prompts,
        lengths,
        jax.random.split(jax.random.key(0), (len(lengths), SAMPLES)),
    )


@functools.cache
def golden(case):
    with np.load(GOLDEN) as file:
        prefix = f"{case}/"
        return {n.removeprefix(prefix): file[n] for n in file.files if n.startswith(prefix)}


def write_folder(folder, arrays):
    """A Hugging Face folder, float32, with the config.json of the golden file."""
    tensors = {
        name.removeprefix("tensors/"): x.astype(np.float32)
        for name, x in arrays.items()
        if name.startswith("tensors/")
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(str(arrays["config.json"]))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(config, params) of a golden case."""

    @functools.cache
    def open_(case):
        folder = tmp_path_factory.mktemp(case)
        write_folder(folder, golden(case))
        config = read_config(folder)
        return config, load_params(folder, config)

    return open_


def check_bfloat16(found, wanted, allowed):
    """bfloat16 logits are about as close to float32 ones as those of torch are."""
    assert divergence(wanted, np.asarray(found)) <= 1.5 * allowed + 1e-5


def check_greedy(config, params, prompts, lengths, wanted):
    found = greedy(config, params, prompts.astype(np.int32), lengths)
    for sample in range(SAMPLES):
        np.testing.assert_array_equal(found.ids[:, sample], wanted)
    assert (found.lengths == NEW).all()
    assert (found.stops == STOPPED_AT_LENGTH).all()


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case, opened):
    (config, params), arrays = opened(case), golden(case)
    found = logits_of(config, Compute(), params, arrays["tokens"].astype(np.int32))
    assert np.std(arrays["logits"]) > 1
    assert np.max(np.abs(found[:, LOGITS_AT] - arrays["logits"])) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_golden_generation(case, opened):
    arrays = golden(case)
    assert varied(arrays["greedy"]) >= VARIED
    check_greedy(*opened(case), arrays["prompts"], arrays["lengths"], arrays["greedy"])


@pytest.mark.parametrize("case", CASES)
def test_golden_bfloat16(case, opened):
    (config, params), arrays = opened(case), golden(case)
    tokens = arrays["tokens"].astype(np.int32)
    found = logits_of(config, Compute(dtype="bfloat16"), params, tokens)[:, LOGITS_AT]
    check_bfloat16(found, arrays["logits"], float(arrays["bfloat16_divergence"]))


# Per case, its special property switched off.
PLAINER = {
    "llama_linear": {"kind": "default"},
    "llama_dynamic": {"kind": "default"},
    "llama_llama3": {"kind": "default"},
    "llama_yarn": {"scale": 1.0},
    "llama_yarn_mscale": {"truncate": True},
    "qwen3_yarn": {"kind": "default"},
    "qwen2_window": {"window": None},
    "mistral_window": {"window": 6},
    "smollm3": {"rope": Rope()},
    "smollm3_dynamic": {"window": 10},
    "olmo3": {"window": None},
}


@pytest.mark.parametrize("case", PLAINER)
def test_the_special_property_of_a_case_changes_its_logits(case, opened):
    (config, params), arrays, change = opened(case), golden(case), PLAINER[case]

    def plainer(kind: LayerKind):
        if "rope" in change:
            return dataclasses.replace(kind, rope=kind.rope or change["rope"])
        if "window" in change:
            return dataclasses.replace(kind, window=kind.window and change["window"])
        return dataclasses.replace(kind, rope=dataclasses.replace(kind.rope, **change))

    other = dataclasses.replace(config, layer_kinds=tuple(map(plainer, config.layer_kinds)))
    assert other != config
    found = logits_of(other, Compute(), params, arrays["tokens"].astype(np.int32))
    # A hundred times the tolerance of the parity tests.
    assert np.max(np.abs(found[:, LOGITS_AT] - arrays["logits"])) > 100 * TOLERANCE


@pytest.fixture(scope="module")
def sampled(opened):
    """A case's prompts, as (params, policy, rows, log-probs of the sampler)."""

    @functools.cache
    def sample(case):
        (config, params), arrays = opened(case), golden(case)
        prompts, lengths = arrays["prompts"].astype(np.int32), arrays["lengths"]
        out = greedy(config, params, prompts, lengths)
        rows = [
            TokenizedExample(prompt[:length].tolist(), np.asarray(ids[0]).tolist())
            for prompt, length, ids in zip(prompts, lengths, out.ids, strict=True)
        ]
        return params, Policy(config, Compute(logits_chunk=64)), rows, out.logps[:, 0]

    return sample


@pytest.mark.parametrize("case", CASES)
def test_training_computes_the_log_probs_that_the_sampler_drew_with(case, sampled):
    params, policy, rows, wanted = sampled(case)
    # Padded differently from the prompts.
    found = completion_logps(policy, params, collate(rows, PadShape(112, NEW)))
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ["qwen2_window", "llama_dynamic", "smollm3_dynamic", "olmo3"])
def test_right_padding_has_no_influence(case, sampled):
    params, policy, rows, _ = sampled(case)
    rows = [
        TokenizedExample(row.prompt, row.completion[:n])
        for row, n in zip(rows, (64, 9, 1), strict=True)
    ]
    wanted = completion_logps(policy, params, collate(rows, PadShape(112, NEW)))
    others = [
        collate(rows, PadShape(112, NEW), pad_id=7),
        # Long enough to scale a dynamic rope if padding were counted.
        collate(rows, PadShape(160, NEW)),
    ]
    for sequences in others:
        found = completion_logps(policy, params, sequences)
        np.testing.assert_allclose(
            np.where(sequences.mask, found, 0), np.where(sequences.mask, wanted, 0),
            rtol=0, atol=TOLERANCE,
        )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Who wrote The Sea?", "Anna Berg, born in 1971, wrote it."], 280)


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Threads would wait for each other longer than these models compute.
    yield torch
    torch.set_num_threads(threads)


# The golden files hold the same comparison with other weights, and are in the default tests.
@pytest.mark.slow
@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("case", CASES)
def test_live_parity(case, tmp_path):
    seed = CASES[case].seeds[1]
    model, tokens, (prompts, lengths) = build(case, seed), random_tokens(seed), random_prompts(seed)
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    # transformers writes other fields than the published config.json has, with equal meaning.
    (tmp_path / "config.json").write_text(str(golden(case)["config.json"]))
    assert read_config(tmp_path) == config

    params, wanted = load_params(tmp_path, config), torch_logits(model, tokens)
    assert np.std(wanted) > 1
    found = logits_of(config, Compute(), params, tokens)
    assert np.max(np.abs(found - wanted)) <= TOLERANCE
    allowed = divergence(wanted, torch_logits(narrow(model), tokens))
    check_bfloat16(logits_of(config, Compute(dtype="bfloat16"), params, tokens), wanted, allowed)
    ids, margin = torch_greedy(model, prompts, lengths)
    assert margin > MARGIN
    assert varied(ids) >= VARIED
    check_greedy(config, params, prompts, lengths, ids)


@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_our_folders(case, tmp_path, tokenizer, torch):
    from transformers import AutoModelForCausalLM

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    original = build(case, seed=2)
    original.save_pretrained(theirs)
    config = read_config(theirs)
    params = load_params(theirs, config)
    tokens = random_tokens(seed=2)
    found = logits_of(config, Compute(), params, tokens)
    # With its own config.json, with the golden one, and with one of `config_json`.
    spellings = [json.loads((theirs / "config.json").read_text())]
    spellings += [json.loads(str(golden(case)["config.json"]))]
    spellings += [None] if case in ("llama", "llama_tied", "qwen2", "qwen3") else []
    for fields in spellings:
        save_folder(ours, config, params, tokenizer, fields)
        model, info = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(model) is type(original)
        wanted = original.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name
        assert np.max(np.abs(found - torch_logits(model.eval(), tokens))) <= TOLERANCE
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert read_config(ours) == config
    text = "<｜User｜>Who wrote The Sea?<｜Assistant｜><think>\n"
    assert load_tokenizer(ours).encode(text) == tokenizer.encode(text)
