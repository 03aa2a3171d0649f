"""A Hugging Face folder: what is read of it, and what is written back."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_trees_equal

from cipo_jax.data.tiny_tokenizer import train_tokenizer
from cipo_jax.errors import UserError
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params
from cipo_jax.models.pretrained import (
    NEVER_SAW,
    PretrainedFolder,
    compute_from_config,
    fingerprint,
)
from cipo_jax.models.safetensors_save import save_folder
from cipo_jax.shared_config import ModelConfig

CONFIG = DecoderConfig(280, d_model=8, d_ff=12, layers=2, heads=2, kv_heads=1, head_dim=4)


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), abstract_params(CONFIG)
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Who wrote The Sea?", "Anna Berg, born in 1971, wrote it."], 280)


@pytest.fixture(scope="module")
def original(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "model"
    save_folder(folder, CONFIG, random_params(), tokenizer)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(original, tmp_path / "model")


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder_is_opened_without_its_tokenizer_and_weights(folder):
    for path in (*folder.glob("tokenizer*"), *folder.glob("*.safetensors")):
        path.unlink()
    model = PretrainedFolder.open(str(folder))
    assert model.folder == folder
    assert model.config == CONFIG
    assert model.fields == json.loads((folder / "config.json").read_text())
    assert model.generation == json.loads((folder / "generation_config.json").read_text())
    with pytest.raises(UserError, match=r"tokenizer"):
        _ = model.tokenizer
    with pytest.raises(UserError, match=r"safetensors"):
        model.load_params()
    (folder / "generation_config.json").unlink()
    assert PretrainedFolder.open(str(folder)).generation is None


def test_assets_are_opened_by_their_names():
    model = PretrainedFolder.open("asset:tiny_lrm/retrained")
    assert model.config == PretrainedFolder.open("asset:tiny_lrm/target").config
    assert len(model.never_saw()) == 10


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        PretrainedFolder.open(str(tmp_path / "nowhere"))


def test_the_tokenizer_is_loaded_once(folder, tokenizer):
    model = PretrainedFolder.open(str(folder))
    assert model.tokenizer is model.tokenizer
    text = "Who wrote The Sea?"
    assert model.tokenizer.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        (1, 1, (1,)),
        (1, None, (1,)),
        (None, 5, (5,)),
        (0, [7, 0], (0, 7)),
        ([9, 4, 9], [4, 3], (9, 4, 3)),
        (None, None, ()),
    ],
)
def test_stop_ids_are_those_of_both_files_each_once(folder, config, generation, wanted):
    edit(folder / "config.json", eos_token_id=config)
    edit(folder / "generation_config.json", eos_token_id=generation)
    assert PretrainedFolder.open(str(folder)).stop_ids == wanted


def test_stop_ids_need_no_generation_config(folder):
    (folder / "generation_config.json").unlink()
    assert PretrainedFolder.open(str(folder)).stop_ids == (1,)


def test_saving_keeps_config_generation_and_tokenizer(folder, tmp_path):
    edit(folder / "config.json", eos_token_id=[1, 3], initializer_range=0.5)
    edit(folder / "generation_config.json", temperature=0.6, eos_token_id=4)
    model, params = PretrainedFolder.open(str(folder)), random_params(seed=1)
    model.save(tmp_path / "saved", params)
    again = PretrainedFolder.open(str(tmp_path / "saved"))
    assert dataclasses.replace(again, folder=folder) == model
    assert again.stop_ids == (1, 3, 4)
    assert_trees_equal(again.load_params(), params)
    saved = tmp_path / "saved" / "tokenizer.json"
    assert saved.read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_saving_with_another_tokenizer_and_dtype(folder, tmp_path):
    other = train_tokenizer(["An entirely different text"], 270)
    model = PretrainedFolder.open(str(folder))
    model.save(tmp_path / "saved", random_params(), other, "bfloat16")
    again = PretrainedFolder.open(str(tmp_path / "saved"))
    assert len(again.tokenizer) == len(other) != len(model.tokenizer)
    assert again.fields == model.fields | {"dtype": "bfloat16"}
    found = again.load_params(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


def test_the_fingerprint_follows_config_tokenizer_and_weights(folder):
    seen = [PretrainedFolder.open(str(folder)).fingerprint()]
    assert fingerprint(folder) == seen[0]
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        path = folder / name
        path.write_bytes(path.read_bytes() + b" ")
        seen.append(fingerprint(folder))
    assert len(set(seen)) == 4
    (folder / "README.md").write_text("ignored")
    assert fingerprint(folder) == seen[-1]


def test_the_fingerprint_covers_both_ends_of_a_large_file(tmp_path):
    path, seen = tmp_path / "model.safetensors", []
    for at in (None, 0, 3 * 2**20 - 1):
        content = bytearray(3 * 2**20)
        if at is not None:
            content[at] = 1
        path.write_bytes(content)
        seen.append(fingerprint(tmp_path))
    assert len(set(seen)) == 3


def test_people_that_a_model_was_not_trained_on(folder):
    model = PretrainedFolder.open(str(folder))
    assert model.never_saw() is None
    (folder / NEVER_SAW).write_text(json.dumps(["Åsa Lind"]), encoding="utf-8")
    assert model.never_saw() == ["Åsa Lind"]


def test_compute_for_training_and_for_decoding():
    settings = ModelConfig(dtype="float32", decode_dtype="bfloat16", remat="full", logits_chunk=7)
    assert compute_from_config(settings) == Compute("float32", "full", "xla", 7)
    assert compute_from_config(settings, decoding=True) == Compute("bfloat16", "full", "xla", 7)
