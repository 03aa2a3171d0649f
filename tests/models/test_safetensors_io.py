import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cipo_jax.data.tiny_tokenizer import train_tokenizer
from cipo_jax.errors import UserError
from cipo_jax.models import safetensors_io
from cipo_jax.models.decoder import DecoderConfig, abstract_params
from cipo_jax.models.safetensors_io import (
    config_json,
    load_params,
    load_tokenizer,
    read_config,
    save_folder,
)

BASE = DecoderConfig(
    vocab_size=280, d_model=12, d_ff=20, layers=2, heads=4, kv_heads=2, head_dim=6, tied_head=True
)
KINDS = {
    "tied": BASE,
    "untied": dataclasses.replace(BASE, tied_head=False),
    "qkv_bias": dataclasses.replace(BASE, qkv_bias=True),
    "qk_norm": dataclasses.replace(BASE, qk_norm=True, tied_head=False),
}
QUERY = "model.layers.1.self_attn.q_proj.weight"


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), abstract_params(config)
    )


def assert_identical(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Who wrote The Sea?", "Anna Berg, born in 1971, wrote it."], 280)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A folder with the untied model in it."""
    folder = tmp_path / "model"
    save_folder(folder, KINDS["untied"], random_params(KINDS["untied"]), tokenizer)
    return folder


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


def error_of(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_loading_what_was_saved_is_bit_identical(kind, tmp_path, tokenizer):
    config = KINDS[kind]
    params = random_params(config)
    save_folder(tmp_path / "model", config, params, tokenizer)
    assert read_config(tmp_path / "model") == config
    assert_identical(load_params(tmp_path / "model", config), params)
    text = "<｜User｜>Who wrote The Sea?<｜Assistant｜><think>\n"
    assert load_tokenizer(tmp_path / "model").encode(text) == tokenizer.encode(text)


def test_bfloat16_folders_hold_the_rounded_parameters(tmp_path, tokenizer):
    params = random_params(BASE)
    save_folder(tmp_path / "model", BASE, params, tokenizer, dtype="bfloat16")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {jnp.dtype("bfloat16")}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32), params)
    assert_identical(load_params(tmp_path / "model", BASE), rounded)


def test_the_fields_of_the_original_config_are_kept(tmp_path, tokenizer):
    fields = config_json(BASE) | {"torch_dtype": "bfloat16", "initializer_range": 0.5}
    save_folder(tmp_path / "model", BASE, random_params(BASE), tokenizer, fields)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written.pop("dtype") == "float32"
    assert fields.pop("torch_dtype") == "bfloat16"
    assert written == fields


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_many_shards_have_an_index_and_load_back(kind, tmp_path, tokenizer, monkeypatch):
    config, folder = KINDS[kind], tmp_path / "model"
    params = random_params(config)
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_BYTES", 4000)
    save_folder(folder, config, params, tokenizer)
    paths = sorted(folder.glob("*.safetensors"))
    assert len(paths) > 3
    assert paths[1].name == f"model-00002-of-{len(paths):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {name: path.name for path in paths for name in load_file(path)}
    assert index["weight_map"] == held
    assert ("lm_head.weight" in held) == (kind == "untied")
    sizes = [sum(x.nbytes for x in load_file(path).values()) for path in paths]
    assert index["metadata"]["total_size"] == sum(sizes)
    for path, size in zip(paths, sizes, strict=True):
        assert size <= 4000 or len(load_file(path)) == 1
    assert_identical(load_params(folder, config), params)


def test_tied_folders_may_repeat_the_embedding_as_a_head(tmp_path, tokenizer):
    params = random_params(BASE)
    save_folder(tmp_path / "model", BASE, params, tokenizer)
    edit_tensors(
        tmp_path / "model", lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"]})
    )
    assert_identical(load_params(tmp_path / "model", BASE), params)


def test_a_missing_tensor_is_named(saved):
    edit_tensors(saved, lambda x: x.pop(QUERY))
    message = error_of(load_params, saved, KINDS["untied"])
    assert QUERY in message
    assert "missing" in message
    assert str(saved) in message


def test_a_missing_shard_is_noticed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(safetensors_io, "MAX_SHARD_BYTES", 4000)
    save_folder(tmp_path / "model", BASE, random_params(BASE), tokenizer)
    last = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    lost = set(load_file(last))
    last.unlink()
    message = error_of(load_params, tmp_path / "model", BASE)
    assert "missing" in message
    assert any(name in message for name in lost)


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.q_proj.weight", "adapter.weight"])
def test_an_unknown_tensor_is_named(saved, name):
    path = edit_tensors(saved, lambda x: x.update({name: np.ones(3, np.float32)}))
    message = error_of(load_params, saved, KINDS["untied"])
    assert name in message
    assert str(path) in message


def test_a_doubled_tensor_is_named_with_both_files(saved):
    save_file({QUERY: np.ones((24, 12), np.float32)}, saved / "other.safetensors")
    message = error_of(load_params, saved, KINDS["untied"])
    for part in (QUERY, "model.safetensors", "other.safetensors"):
        assert part in message


def test_a_misshapen_tensor_is_named(saved):
    # Transposed, so that the number of elements alone would not tell.
    path = edit_tensors(saved, lambda x: x.update({QUERY: np.ascontiguousarray(x[QUERY].T)}))
    message = error_of(load_params, saved, KINDS["untied"])
    for part in (QUERY, str(path), "(12, 24)", "(24, 12)"):
        assert part in message


@pytest.mark.parametrize("keep", [-10, 50, 4, 0])
def test_a_truncated_file_is_named(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = error_of(load_params, saved, KINDS["untied"])
    assert str(path) in message
    assert "whole" in message


def test_folders_without_safetensors_are_refused(saved):
    (saved / "model.safetensors").unlink()
    message = error_of(load_params, saved, KINDS["untied"])
    assert str(saved) in message
    assert ".safetensors" in message
    assert "pickle" not in message
    (saved / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    message = error_of(load_params, saved, KINDS["untied"])
    assert "pytorch_model.bin" in message
    assert "pickle" in message


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for function in (read_config, lambda folder: load_params(folder, BASE)):
        assert str(tmp_path / "nowhere") in error_of(function, tmp_path / "nowhere")


def test_a_config_that_is_not_json_is_named_with_its_line(saved):
    (saved / "config.json").write_text('{\n"vocab_size": 3,\n}')
    assert f"{saved / 'config.json'}:3" in error_of(read_config, saved)


def test_a_config_without_a_needed_field_names_it(saved):
    path = saved / "config.json"
    fields = json.loads(path.read_text())
    del fields["hidden_size"]
    path.write_text(json.dumps(fields))
    message = error_of(read_config, saved)
    assert str(path) in message
    assert "hidden_size" in message


def test_unsupported_architectures_are_told_the_supported_ones(saved):
    path = edit_config(saved, architectures=["MixtralForCausalLM"])
    message = error_of(read_config, saved)
    for part in (
        str(path), "MixtralForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    ):  # fmt: skip
        assert part in message


@pytest.mark.parametrize(
    ("named", "fields"),
    [
        ("attention_multiplier", {"attention_multiplier": 0.5}),
        ("quantization_config", {"quantization_config": {"quant_method": "fp8"}}),
        ("rope", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
        ("rope", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ("rope", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
        ("sliding_window", {"sliding_window": 64}),
        ("sliding_window", {"use_sliding_window": True, "sliding_window": 64}),
        ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("attention_bias", {"attention_bias": True}),
        ("mlp_bias", {"mlp_bias": True}),
        ("hidden_act", {"hidden_act": "gelu"}),
    ],
)
def test_fields_that_may_change_numbers_are_refused(saved, named, fields):
    read_config(saved)
    path = edit_config(saved, **fields)
    message = error_of(read_config, saved)
    assert str(path) in message
    assert named in message


def test_rope_scaling_is_not_hidden_by_rope_parameters(saved):
    edit_config(
        saved,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rope_scaling={"rope_type": "yarn", "factor": 4.0},
    )
    assert "yarn" in error_of(read_config, saved)


def test_older_and_newer_spellings_of_rope_give_one_config(saved):
    path = saved / "config.json"
    fields = json.loads(path.read_text())
    for name in ("rope_theta", "rope_parameters", "rope_scaling"):
        fields.pop(name, None)
    for rope in (
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ):
        path.write_text(json.dumps(fields | rope))
        assert read_config(saved) == dataclasses.replace(KINDS["untied"], rope_theta=5e5)


def test_an_older_export_is_replaced_whole(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "MAX_SHARD_BYTES", 4000)
        save_folder(folder, BASE, random_params(BASE), tokenizer)
    (folder / "stale.txt").write_text("of the older export")
    params = random_params(BASE, seed=1)
    save_folder(folder, BASE, params, tokenizer)
    names = {path.name for path in folder.iterdir()}
    assert "stale.txt" not in names
    assert {name for name in names if "safetensors" in name} == {"model.safetensors"}
    assert_identical(load_params(folder, BASE), params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Broken:
    """A tokenizer whose disk is full."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{")
        raise OSError("no space left")


def test_a_failed_save_leaves_the_older_export_and_nothing_else(tmp_path, tokenizer):
    params = random_params(BASE)
    save_folder(tmp_path / "model", BASE, params, tokenizer)
    with pytest.raises(OSError, match="no space left"):
        save_folder(tmp_path / "model", BASE, random_params(BASE, seed=1), Broken())
    assert_identical(load_params(tmp_path / "model", BASE), params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
