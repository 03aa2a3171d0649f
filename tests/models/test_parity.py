import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_decoder_golden import CASES, GOLDEN, build, random_tokens, torch_logits
from safetensors.numpy import save_file

from cipo_jax.data.tiny_tokenizer import train_tokenizer
from cipo_jax.models.decoder import Compute, decoding_layout, head_matrix, hidden_states
from cipo_jax.models.safetensors_io import load_params, load_tokenizer, read_config, save_folder
from cipo_jax.sampling.decode import STOPPED_AT_LENGTH, Rules, generate

# Float32 on both sides; logits are a few units large and a few dozen roundings deep.
TOLERANCE = 1e-4


@jax.jit(static_argnums=0)
def logits_of(config, params, tokens):
    hidden = hidden_states(config, Compute(), params, tokens)
    return hidden @ head_matrix(config, params)


def check_logits(folder, tokens, wanted):
    config = read_config(folder)
    found = logits_of(config, load_params(folder, config), jnp.asarray(tokens))
    assert np.std(wanted) > 1
    assert np.max(np.abs(found - wanted)) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case, tmp_path):
    with np.load(GOLDEN) as golden:
        arrays = {name.removeprefix(f"{case}/"): golden[name] for name in golden.files}
    (tmp_path / "config.json").write_text(str(arrays["config.json"]))
    prefix = "tensors/"
    tensors = {
        name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    check_logits(tmp_path, arrays["tokens"], arrays["logits"])


@pytest.mark.parametrize("case", CASES)
def test_live_logits(case, tmp_path):
    pytest.importorskip("torch")
    model, tokens = build(case, seed=1), random_tokens(seed=1)
    model.save_pretrained(tmp_path)
    check_logits(tmp_path, tokens, torch_logits(model, tokens))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Who wrote The Sea?", "Anna Berg, born in 1971, wrote it."], 280)


@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_our_folders(case, tmp_path, tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    original = build(case, seed=2)
    original.save_pretrained(theirs)
    config = read_config(theirs)
    params = load_params(theirs, config)
    tokens = random_tokens(seed=2)
    found = logits_of(config, params, jnp.asarray(tokens))
    # With a config.json of our own, and with the one that the model came with.
    for fields in (None, json.loads((theirs / "config.json").read_text())):
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


def test_greedy_generation_equals_that_of_transformers(tmp_path, tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    build("llama_tied", seed=3).save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs", config)
    save_folder(tmp_path / "ours", config, params, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    model.generation_config.eos_token_id = None

    lengths = np.array([1, 5, 9], np.int32)
    rng = np.random.default_rng(4)
    prompts = rng.integers(3, config.vocab_size, size=(3, 9)).astype(np.int32)
    found = jax.jit(generate, static_argnums=(0, 1, 2))(
        config,
        Compute(),
        Rules(max_new_tokens=32, stop_ids=()),
        decoding_layout(config, params, "float32"),
        prompts,
        lengths,
        jax.random.split(jax.random.key(0), (3, 2)),
    )
    for i, length in enumerate(lengths):
        ids = torch.from_numpy(prompts[i : i + 1, :length]).long()
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
        )[0].numpy()
        assert len(whole) == length + 32
        logps = torch_logits(model, whole[None].astype(np.int32))[0, length - 1 : -1]
        logps = logps - np.log(np.exp(logps.astype(np.float64)).sum(-1, keepdims=True))
        for sample in range(2):
            np.testing.assert_array_equal(found.ids[i, sample], whole[length:])
            wanted = logps[np.arange(32), whole[length:]]
            np.testing.assert_allclose(found.logps[i, sample], wanted, rtol=0, atol=TOLERANCE)
    assert (found.lengths == 32).all()
    assert (found.stops == STOPPED_AT_LENGTH).all()
    assert len(np.unique(found.ids[2])) > 3
