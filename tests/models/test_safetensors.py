import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_reading import Alive, counted_reads, plain_params, plain_tensors
from safetensors.numpy import load_file, save_file
from trees import assert_trees_equal
from two_processes import told_by_two

from cipo_jax.data.tiny_tokenizer import train_tokenizer
from cipo_jax.errors import UserError
from cipo_jax.hub import load_tokenizer
from cipo_jax.models import safetensors_save
from cipo_jax.models.decoder import DecoderConfig, abstract_params
from cipo_jax.models.hf_config import config_json, decoder_config, read_config
from cipo_jax.models.safetensors_load import load_params
from cipo_jax.models.safetensors_save import save_folder
from cipo_jax.models.tensor_names import get, keys
from cipo_jax.training.mesh import make_mesh, param_shardings

pytestmark = pytest.mark.usefixtures("quick_compilation")

BASE = DecoderConfig(
    vocab_size=280, d_model=12, d_ff=20, layers=2, heads=4, kv_heads=2, head_dim=6, tied_head=True
)
KINDS = {
    "tied": BASE,
    "untied": dataclasses.replace(BASE, tied_head=False),
    "qkv_bias": dataclasses.replace(BASE, qkv_bias=True),
    "qk_norm": dataclasses.replace(BASE, qk_norm="head", tied_head=False),
}
# Fields of a config.json; `config_json` writes none for some of these architectures.
_SIZES = {
    "vocab_size": 280,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-6,
}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "smollm3": {"attention_bias": True},
    "olmo2": {},
    "olmo3": {"attention_bias": True},
}
_NAMES = {"smollm3": "SmolLM3"}
QUERY = "model.layers.1.self_attn.q_proj.weight"


def fields_of(family, **changes):
    name = f"{_NAMES.get(family, family.title())}ForCausalLM"
    names = {"architectures": [name], "model_type": family}
    return _SIZES | names | FAMILIES[family] | changes


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), abstract_params(config)
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Who wrote The Sea?", "Anna Berg, born in 1971, wrote it."], 280)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A folder with the untied model."""
    folder = tmp_path / "model"
    save_folder(folder, KINDS["untied"], random_params(KINDS["untied"]), tokenizer)
    return folder


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
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
    assert_trees_equal(load_params(tmp_path / "model", config), params)
    text = "<｜User｜>Who wrote The Sea?<｜Assistant｜><think>\n"
    assert load_tokenizer(tmp_path / "model").encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_through_a_folder_bit_by_bit(family, tmp_path, tokenizer):
    fields = fields_of(family)
    config = decoder_config(fields)
    params = random_params(config)
    save_folder(tmp_path / "model", config, params, tokenizer, fields)
    assert read_config(tmp_path / "model") == config
    found = load_params(tmp_path / "model", config)
    assert_trees_equal(found, params)
    assert_trees_equal(found, plain_params(tmp_path / "model", config))
    save_folder(tmp_path / "again", config, found, tokenizer, fields)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_bfloat16_folders_hold_the_rounded_parameters(tmp_path, tokenizer):
    params = random_params(BASE)
    save_folder(tmp_path / "model", BASE, params, tokenizer, dtype="bfloat16")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {jnp.dtype("bfloat16")}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32), params)
    assert_trees_equal(load_params(tmp_path / "model", BASE), rounded)


def test_the_fields_of_the_original_config_are_kept(tmp_path, tokenizer):
    fields = config_json(BASE) | {"torch_dtype": "bfloat16", "initializer_range": 0.5}
    save_folder(tmp_path / "model", BASE, random_params(BASE), tokenizer, fields)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written.pop("dtype") == "float32"
    assert fields.pop("torch_dtype") == "bfloat16"
    assert written == fields


def store(folder, dtype, config=KINDS["untied"]):
    """Stored numbers, of which float32 has more bits than any 16-bit type."""
    rng = np.random.default_rng(1)
    tensors = {
        name: rng.normal(size=x.shape).astype(dtype) for name, x in plain_tensors(folder).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_numbers_are_cast_once(saved, stored, dtype):
    store(saved, stored)
    config = KINDS["untied"]
    found = load_params(saved, config, dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    assert_trees_equal(found, jax.tree.map(jnp.asarray, plain_params(saved, config, dtype)))


def test_narrow_parameters_come_back_bit_by_bit(saved, tmp_path, tokenizer):
    stored = store(saved, "bfloat16")
    params = load_params(saved, KINDS["untied"], dtype="bfloat16")
    save_folder(tmp_path / "again", KINDS["untied"], params, tokenizer, dtype="bfloat16")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == stored.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x.view(np.uint16), stored[name].view(np.uint16))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tokenizer):
    """family -> (folder with some dozen files, config)."""
    folders = {}

    def make(family):
        if family not in folders:
            fields = fields_of(family)
            folders[family] = tmp_path_factory.mktemp(family), decoder_config(fields)
            folder, config = folders[family]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(safetensors_save, "MAX_SHARD_BYTES", 6000)
                save_folder(folder, config, random_params(config), tokenizer, fields)
            assert len(list(folder.glob("*.safetensors"))) > 6
        return folders[family]

    return make


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        *(("llama", mesh) for mesh in [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]),
        ("olmo3", (2, 2, 2)),
    ],
    ids=str,
)
def test_every_mesh_has_the_stored_values_and_reads_them_once(family, mesh, sharded):
    folder, config = sharded(family)
    shardings = param_shardings(abstract_params(config), make_mesh(*mesh))
    with counted_reads() as reads:
        found = load_params(folder, config, shardings)
    assert_trees_equal(found, plain_params(folder, config))
    for x, sharding in zip(*map(jax.tree.leaves, (found, shardings)), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    # Devices with copies share one read; no tensor is read whole to be sliced afterwards.
    assert {k: sum(sizes) for k, sizes in reads.items()} == {
        k: x.nbytes for k, x in plain_tensors(folder).items()
    }
    for name in (QUERY, "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        assert len(reads[name]) == mesh[1] * mesh[2]
    assert len(reads["model.norm.weight"]) == 1


def test_a_vocabulary_that_tensor_does_not_divide_is_not_split(tmp_path, tokenizer):
    config = dataclasses.replace(KINDS["untied"], vocab_size=281)
    params = random_params(config)
    save_folder(tmp_path / "model", config, params, tokenizer)
    shardings = param_shardings(abstract_params(config), make_mesh(1, 4, 2))
    found = load_params(tmp_path / "model", config, shardings)
    assert_trees_equal(found, params)
    assert {shard.data.shape for shard in found["embed"].addressable_shards} == {(281, 3)}
    assert {shard.data.shape for shard in found["head"].addressable_shards} == {(3, 281)}


def test_folders_saved_from_a_mesh_are_those_saved_from_one_device(sharded, tmp_path, tokenizer):
    folder, config = sharded("llama")
    fields = json.loads((folder / "config.json").read_text())
    shardings = param_shardings(abstract_params(config), make_mesh(2, 2, 2))
    save_folder(tmp_path / "a", config, load_params(folder, config), tokenizer, fields)
    save_folder(tmp_path / "b", config, load_params(folder, config, shardings), tokenizer, fields)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.slow
def test_two_processes_read_half_each_and_write_one_folder(sharded, tmp_path):
    folder, config = sharded("llama")
    script = Path(__file__).with_name("loading_process.py")
    results = told_by_two(script, folder, tmp_path / "model")
    tensors = plain_tensors(folder)
    for one in results:
        assert one["right"]
        assert one["there"]
        for name, x in tensors.items():
            # Only norms are on every device.
            whole = x.ndim == 1 and name.endswith("norm.weight")
            kv_bias = name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias",
                                     "gate_proj.bias", "up_proj.bias"))  # fmt: skip
            share = 1 if whole or kv_bias else 2
            assert one["read"][name] * share == x.nbytes, name
    # Each process read another half.
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    written = plain_tensors(tmp_path / "model")
    assert written.keys() == tensors.keys()
    for name, x in written.items():
        np.testing.assert_array_equal(x, tensors[name])
    assert read_config(tmp_path / "model") == config


def memory():
    """Bytes of the buffers of all JAX arrays, by address."""
    shards = [shard.data for x in jax.live_arrays() for shard in x.addressable_shards]
    return {x.unsafe_buffer_pointer(): x.nbytes for x in shards}


@pytest.mark.parametrize(
    ("dtype", "mesh"), [("float32", None), ("bfloat16", None), ("float32", (1, 8, 1))], ids=str
)
def test_one_stored_tensor_is_in_memory_besides_the_result(dtype, mesh, tmp_path, tokenizer):
    # Layers are larger than the vocabulary, so that the test would notice two at a time.
    config = dataclasses.replace(KINDS["untied"], d_model=64, d_ff=512, layers=4)
    save_folder(tmp_path / "model", config, random_params(config), tokenizer)
    abstract = abstract_params(config)
    shardings = param_shardings(abstract, make_mesh(*mesh)) if mesh else None
    load_params(tmp_path / "model", config, shardings, dtype)  # Compiling leaves constants behind.

    # Bytes of the result when each tensor is read; tensors are loaded in the order of the table.
    there, sizes = 0, {}
    for key in keys(config):
        shape = get(abstract, key.path).shape
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        if mesh:  # Norms are on every device.
            sharding = get(shardings, key.path)
            size = size // math.prod(shape) * 8 * math.prod(sharding.shard_shape(shape))
        if key.stacked:  # A stack is made first and filled after.
            there += size
        for i in range(config.layers if key.stacked else 1):
            sizes[key.name.format(i=i)] = there
        there += 0 if key.stacked else size
    alive, before, beyond = Alive(), sum(memory().values()), []

    def seen(name, part):
        alive.add(part)
        everything = alive.addresses() | memory()
        beyond.append(sum(everything.values()) - before - sizes[name])

    with counted_reads(seen) as reads:
        params = load_params(tmp_path / "model", config, shardings, dtype)
    largest = max(sum(parts) for parts in reads.values())
    assert largest == max(x.nbytes for x in plain_tensors(tmp_path / "model").values())
    # A layer's index is an array too.
    assert 0.5 * largest < max(beyond) <= largest + 1024
    shards = [s for x in jax.tree.leaves(params) for s in x.addressable_shards]
    assert sum(shard.data.nbytes for shard in shards) == there


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_many_shards_have_an_index_and_load_back(kind, tmp_path, tokenizer, monkeypatch):
    config, folder = KINDS[kind], tmp_path / "model"
    params = random_params(config)
    monkeypatch.setattr(safetensors_save, "MAX_SHARD_BYTES", 4000)
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
    assert_trees_equal(load_params(folder, config), params)


def test_tied_folders_may_repeat_the_embedding_as_a_head(tmp_path, tokenizer):
    params = random_params(BASE)
    save_folder(tmp_path / "model", BASE, params, tokenizer)
    edit_tensors(
        tmp_path / "model", lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"]})
    )
    assert_trees_equal(load_params(tmp_path / "model", BASE), params)


def test_a_missing_tensor_is_named(saved):
    edit_tensors(saved, lambda x: x.pop(QUERY))
    message = error_of(load_params, saved, KINDS["untied"])
    assert QUERY in message
    assert "missing" in message
    assert str(saved) in message


def test_a_missing_shard_is_an_error(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(safetensors_save, "MAX_SHARD_BYTES", 4000)
    save_folder(tmp_path / "model", BASE, random_params(BASE), tokenizer)
    last = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    lost = set(load_file(last))
    last.unlink()
    message = error_of(load_params, tmp_path / "model", BASE)
    assert "missing" in message
    assert any(name in message for name in lost)


def test_a_missing_shard_is_named_by_the_index(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(safetensors_save, "MAX_SHARD_BYTES", 4000)
    save_folder(tmp_path / "model", BASE, random_params(BASE), tokenizer)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    lost = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    lost.unlink()
    message = error_of(load_params, tmp_path / "model", BASE)
    assert any(name in message for name, file in index["weight_map"].items() if file == lost.name)
    assert lost.name in message


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


def test_mistrals_consolidated_copy_is_not_read(saved):
    wanted = load_params(saved, KINDS["untied"])
    (saved / "consolidated.safetensors").write_bytes(b"not even safetensors")
    save_file({QUERY: np.ones((1, 1), np.float32)}, saved / "consolidated-00001.safetensors")
    assert_trees_equal(load_params(saved, KINDS["untied"]), wanted)


def test_the_frequencies_of_old_ropes_are_ignored(saved):
    wanted = load_params(saved, KINDS["untied"])
    series = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    edit_tensors(saved, lambda x: x.update(series))
    assert_trees_equal(load_params(saved, KINDS["untied"]), wanted)


@pytest.mark.parametrize("dtype", ["float64", "int64", "int8", "uint8", "bool"])
def test_a_tensor_of_another_type_is_named(saved, dtype):
    path = edit_tensors(saved, lambda x: x.update({QUERY: np.ones((24, 12), dtype)}))
    message = error_of(load_params, saved, KINDS["untied"])
    for part in (QUERY, str(path), "F32, F16, BF16"):
        assert part in message


def test_adapters_are_not_a_model(saved, tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    adapters = {name: np.ones((2, 12), np.float32)}
    (tmp_path / "lone").mkdir()
    save_file(adapters, tmp_path / "lone" / "adapter_model.safetensors")
    assert str(tmp_path / "lone") in error_of(load_params, tmp_path / "lone", BASE)
    # Beside a model they would be ignored.
    save_file(adapters, saved / "adapter_model.safetensors")
    message = error_of(load_params, saved, KINDS["untied"])
    assert name in message
    assert str(saved / "adapter_model.safetensors") in message


def test_errors_name_the_file_of_many(sharded, tmp_path):
    folder, config = sharded("llama")
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    paths = sorted(copy.glob("*.safetensors"))
    path = next(p for p in paths if QUERY in load_file(p))
    save_file(load_file(path) | {QUERY: np.ones((3, 5), np.float32)}, path)
    message = error_of(load_params, copy, config)
    for part in (QUERY, str(path), "(3, 5)", "(40, 16)"):
        assert part in message
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    assert str(paths[2]) in error_of(load_params, copy, config)


def test_a_misshapen_tensor_is_named(saved):
    # Transposed: the number of elements is right.
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


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in error_of(load_params, tmp_path / "nowhere", BASE)


def test_an_older_export_is_replaced_whole(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_save, "MAX_SHARD_BYTES", 4000)
        save_folder(folder, BASE, random_params(BASE), tokenizer)
    (folder / "stale.txt").write_text("of the older export")
    params = random_params(BASE, seed=1)
    save_folder(folder, BASE, params, tokenizer)
    names = {path.name for path in folder.iterdir()}
    assert "stale.txt" not in names
    assert {name for name in names if "safetensors" in name} == {"model.safetensors"}
    assert_trees_equal(load_params(folder, BASE), params)
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
    assert_trees_equal(load_params(tmp_path / "model", BASE), params)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
