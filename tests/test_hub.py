import json

import huggingface_hub
import huggingface_hub.constants
import jax
import pytest
from huggingface_hub.utils import filter_repo_objects
from trees import assert_trees_equal

from cipo_jax.data.tiny_tokenizer import train_tokenizer
from cipo_jax.errors import UserError
from cipo_jax.hub import load_tokenizer, resolve
from cipo_jax.models.decoder import DecoderConfig, init_params
from cipo_jax.models.pretrained import PretrainedFolder
from cipo_jax.models.safetensors_save import save_folder

TINY = DecoderConfig(280, d_model=8, d_ff=8, layers=1, heads=2, kv_heads=1, head_dim=4)
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Who wrote The Sea?", "Anna Berg, born in 1971, wrote it."], 280)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache of our own, and nothing behind it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "hub" / "models--some--model"
    for commit, names in ((OLD, ["v1.0"]), (NEW, ["main"])):
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(commit)
        for name in names:
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / name).write_text(commit)
    return repository


def error_of(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_assets_lie_in_the_package():
    assert (resolve("asset:tiny_lrm/target") / "config.json").is_file()


def test_paths_are_themselves(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    assert resolve("~/folder") == tmp_path / "folder"
    # Nothing there, and no hub's name either: whoever opens it says so.
    for path in ("nowhere", "./some/model", "../some/model", "/some/model", "some/model/config"):
        assert str(resolve(path)) == str(type(tmp_path)(path))


@pytest.mark.parametrize(
    ("name", "commit"),
    [
        ("some/model", NEW),
        ("some/model@main", NEW),
        ("some/model@v1.0", OLD),
        (f"some/model@{OLD}", OLD),
    ],
)
def test_names_of_the_hub_are_found_in_its_cache(hub, name, commit):
    folder = resolve(name)
    assert folder == hub / "snapshots" / commit
    assert (folder / "config.json").read_text() == commit


def test_a_folder_of_that_name_comes_first(hub, tmp_path):
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert resolve("some/model").resolve() == (tmp_path / "some" / "model").resolve()


@pytest.mark.parametrize("name", ["some/other", "some/model@v9", f"some/model@{'c' * 40}"])
def test_what_the_cache_does_not_have_is_one_line(hub, name):
    message = error_of(resolve, name)
    assert message.startswith(f"{name}: ")
    assert "HF_HUB_OFFLINE is set" in message


def test_without_a_network_the_error_is_one_line(hub, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\n\nto host")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = error_of(resolve, "some/model")
    assert "some/model" in message
    assert "no route" in message
    assert "HF_HUB_OFFLINE" not in message


def test_nothing_pickled_and_no_code_is_fetched(hub, monkeypatch):
    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("some/model@v2") == hub
    assert (asked["repository"], asked["revision"]) == ("some/model", "v2")
    wanted = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model",
        "chat_template.jinja", "model.safetensors", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    unwanted = [
        "pytorch_model.bin", "consolidated.00.pth", "original/consolidated.00.pth", "model.pt",
        "optimizer.ckpt", "model.pkl", "modeling_evil.py", "model.gguf", "consolidated.safetensors",
        "original/params.json", "original/tokenizer.model", "onnx/model.onnx",
        "onnx/config.json", "tf_model.h5", "flax_model.msgpack", "README.md",
    ]  # fmt: skip
    patterns = {k: asked[k] for k in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + unwanted, **patterns)) == wanted


def test_a_model_opens_by_its_name(hub, tokenizer):
    params = init_params(TINY, jax.random.key(0))
    folder = hub / "snapshots" / NEW
    save_folder(folder, TINY, params, tokenizer)
    model = PretrainedFolder.open("some/model")
    assert model.config == TINY
    assert_trees_equal(model.load_params(), params)


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("slow_and_fast", [["evil.Evil", None], [None, "evil.Evil"]], ids=str)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_that_comes_with_a_tokenizer_is_never_run(file, slow_and_fast, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil"}))
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    edit(
        tmp_path / file,
        auto_map={"AutoTokenizer": slow_and_fast, "AutoConfig": "evil.Evil"},
        **({"tokenizer_class": "Evil"} if file == "tokenizer_config.json" else {}),
    )
    try:
        found = load_tokenizer(tmp_path)
    except UserError as error:
        assert str(tmp_path) in str(error)
        assert "\n" not in str(error)
    else:  # Or it is read without: what counts stands in tokenizer.json.
        assert found.encode("Anna") == tokenizer.encode("Anna")
    assert not ran.exists()


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    assert str(tmp_path) in error_of(load_tokenizer, tmp_path)


def test_a_broken_tokenizer_is_one_line(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    message = error_of(load_tokenizer, tmp_path)
    assert str(tmp_path) in message
    assert "tokenizer" in message
