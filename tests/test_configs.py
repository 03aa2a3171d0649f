"""The configs that ship: each is read and compared with a frozen table of its values."""

import dataclasses
import importlib.util
import json
import warnings
from pathlib import Path

import pytest

from cipo_jax.commands.flags import load_config, parse_flags
from cipo_jax.config import (
    Config,
    PretrainConfig,
    flatten,
    long_reasoning_config,
    parse,
    to_config_dict,
)
from cipo_jax.errors import UserError
from cipo_jax.shared_config import RunConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.py"))
GOLDEN = json.loads((ROOT / "tests" / "golden" / "configs.json").read_text())


def read(name):
    """The parsed config of "FILE.py" or "FILE.py:ARG"."""
    cls = PretrainConfig if "pretrain" in name else Config
    return parse(cls, load_config(str(CONFIGS / name)))


def as_json(config):
    """Flat values as config.json holds them."""
    return flatten(json.loads(json.dumps(dataclasses.asdict(config))))


def path_id(path):
    return str(path.relative_to(CONFIGS))


def test_there_are_configs():
    assert {"quickstart.py", "tiny/pretrain.py", "rtofu.py"} <= {path_id(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_every_config_is_read_and_says_how_to_run_it(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # No old key is left in them.
        parsed = read(path_id(path))
    cls = type(parsed)
    assert parsed != cls()
    assert parse(cls, to_config_dict(parsed)) == parsed
    assert parse(cls, json.loads(json.dumps(dataclasses.asdict(parsed)))) == parsed
    hash(parsed)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"--config=configs/{path_id(path)}" in module.__doc__


# ---- frozen values


@pytest.mark.parametrize("name", [key for key in GOLDEN if key.endswith("Config")])
def test_defaults_are_those_of_the_table(name):
    cls = {"Config": Config, "PretrainConfig": PretrainConfig}[name]
    assert as_json(cls()) == GOLDEN[name]


@pytest.mark.parametrize("name", [key for key in GOLDEN if ".py" in key])
def test_every_value_is_that_of_the_table(name):
    """Values before the settings were renamed: what differs from the defaults, key by key."""
    config = read(name)
    expected = GOLDEN[type(config).__name__] | GOLDEN[name]
    found = as_json(config)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, str) and value.startswith("CONFIGS/"):
            value = value.replace("CONFIGS", str(CONFIGS))
        assert found[key] == value, key
        # In rows a whole number may stand for a float.
        assert type(found[key]) is type(value), key


def test_the_table_has_every_config():
    assert {key.split(":")[0] for key in GOLDEN if ".py" in key} == set(map(path_id, FILES))
    expected = GOLDEN["Config"] | GOLDEN["long_reasoning"]
    assert as_json(parse(Config, long_reasoning_config())) == expected


def test_the_shared_settings_are_those_of_the_run():
    shared = {f.name for f in dataclasses.fields(RunConfig)}
    assert shared < {f.name for f in dataclasses.fields(Config)}
    assert isinstance(read("quickstart.py"), RunConfig)


# ---- arguments


@pytest.mark.parametrize(
    ("split", "retain"),
    [("forget01", "retain99"), ("forget05", "retain95"), ("forget10", "retain90")],
)
def test_a_split_of_rtofu_has_the_retain_file_of_its_name(split, retain):
    data = read(f"rtofu.py:split={split},data=/elsewhere").data
    assert (data.forget, data.retain) == (f"/elsewhere:{split}", f"/elsewhere:{retain}")
    assert read(f"rtofu.py:split={split}").data.retain == f"data/r-tofu:{retain}"


def test_the_argument_of_rtofu_chooses_model_and_adapters():
    plain, lora = read("rtofu.py"), read("rtofu.py:lora")
    assert "Llama-8B" in plain.model.path
    assert (plain.lora.rank, plain.mesh.fsdp, plain.train.lr) == (0, 8, 1e-5)
    assert (lora.lora.rank, lora.mesh.fsdp, lora.train.lr) == (16, 1, 1e-4)
    assert read("rtofu.py:lora=true") == lora
    paths = {read(f"rtofu.py:model={m}").model.path for m in ("llama8b", "qwen3_8b", "qwen1p5b")}
    assert len(paths) == 3
    assert {read(f"return.py:model={m}").model.path for m in ("llama8b", "qwen3_8b", "qwen1p5b")} \
        == paths  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rtofu.py:model=llama", "must be one of llama8b, qwen3_8b, qwen1p5b"),
        ("rtofu.py:split=forget20", "must be one of forget10, forget05, forget01"),
        ("rtofu.py:/data/r-tofu", "no such key; nearest: data"),
        ("rtofu.py:lora=16", "must be true or false"),
        ("return.py:folder=x", "no such key; nearest: "),
        ("tiny/compare.py:smok", "no such key; nearest: smoke"),
        ("quickstart.py:fast", "takes none"),
    ],
)
def test_a_wrong_argument_is_named(name, said):
    with pytest.raises(UserError) as caught:
        read(name)
    assert said in str(caught.value)


@pytest.mark.parametrize("path", ["rtofu.py", "return.py"])
def test_benchmark_configs_say_that_they_are_not_usable_yet(path):
    text = (CONFIGS / path).read_text()
    assert "Not usable yet" in text
    assert "leak rule" in text and "training questions" in text


def test_an_argument_and_overrides_go_together():
    argv = [f"--config={CONFIGS / 'rtofu.py'}:model=qwen1p5b,lora", "--config.lora.rank=8"]
    config = parse_flags(Config, "test", argv, "")[0]
    assert (config.lora.rank, config.lora.alpha) == (8, 32.0)
