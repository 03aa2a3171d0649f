import importlib.util
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from cipo_jax.config import (
    Config,
    PretrainConfig,
    default_config,
    flatten,
    nearest,
    parse,
    to_config_dict,
)
from cipo_jax.errors import UserError

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def _nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _message(key, value, cls=Config):
    with pytest.raises(UserError) as caught:
        parse(cls, _nested(key, value))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_parse_to_the_defaults():
    assert parse(Config, default_config()) == Config()
    assert parse(Config, {}) == Config()
    assert parse(PretrainConfig, to_config_dict(PretrainConfig())) == PretrainConfig()


def test_values_survive_a_round_trip():
    config = default_config()
    config.train.lr = 3e-4
    config.cipo.loss = "simpo"
    config.forget.people = "Ada Brandt"
    config.mesh.fsdp = 2
    parsed = parse(Config, config)
    assert (parsed.train.lr, parsed.cipo.loss) == (3e-4, "simpo")
    assert (parsed.forget.people, parsed.mesh.fsdp) == ("Ada Brandt", 2)
    assert parse(Config, to_config_dict(parsed)) == parsed
    assert parsed.warmup == Config().warmup


def test_default_config_is_locked():
    config = default_config()
    with pytest.raises((KeyError, AttributeError), match="lrx"):
        config.train.lrx = 1.0
    with pytest.raises(TypeError):
        config.train.batch = "many"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.lrx", "train.lr"),
        ("train.batchsize", "train.batch"),
        ("cipo.betta", "cipo.beta"),
        ("sampling.temprature", "sampling.temperature"),
        ("sed", "seed"),
        ("lr", "train.lr"),
        ("cipo.lr", "train.lr"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(key, meant):
    message = _message(key, 1)
    assert message.startswith(f"config.{key}: no such setting")
    assert meant in message.split("nearest: ")[1].split(", ")


def test_nearest_goes_by_the_whole_name_and_by_the_last_part():
    known = ["train.lr", "warmup.lr", "train.batch", "seed"]
    assert nearest("train.lr2", known, 2) == "train.lr, warmup.lr"
    assert nearest("batch", known, 1) == "train.batch"


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("train.lr", "abc", "float"),
        ("train.lr", None, "float"),
        ("train.lr", True, "float"),
        ("train.batch", 1.5, "int"),
        ("train.batch", 16.0, "int"),
        ("train.batch", True, "int"),
        ("seed", False, "int"),
        ("data.forget", 3, "str"),
        ("model.path", ["a"], "str"),
    ],
)
def test_a_wrong_type_is_named(key, value, kind):
    message = _message(key, value)
    assert message == f"config.{key} = {value!r}: must be of type {kind}"


def test_a_whole_number_is_a_float_too():
    value = parse(Config, {"train": {"lr": 1}}).train.lr
    assert type(value) is float
    assert value == 1.0


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("train.batch", 0, "at least 1"),
        ("train.batch", -1, "at least 1"),
        ("train.lr", -1e-3, "at least 0"),
        ("seed", -1, "at least 0"),
        ("sampling.top_p", 1.01, "at most 1"),
        ("cipo.label_smoothing", 0.5, "at most 0.499"),
        ("cipo.ema_decay", 2, "at most 1"),
        ("mesh.data", -2, "at least -1"),
        ("data.max_completion_tokens", 1, "at least 2"),
    ],
)
def test_a_value_out_of_range_is_named(key, value, bound):
    message = _message(key, value)
    assert message.startswith(f"config.{key} = ")
    assert f"must be {bound}" in message


@pytest.mark.parametrize("key", ["train.lr", "cipo.beta", "counterfactual.min_gain"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_finite_number_is_refused(key, value):
    assert _message(key, value).startswith(f"config.{key} = {value!r}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cipo.loss", "dop"),
        ("cipo.loss", 1),
        ("cipo.loss", None),
        ("model.dtype", "float16"),
        ("train.decay", "Linear"),
    ],
)
def test_a_choice_is_one_of_those_listed(key, value):
    message = _message(key, value)
    assert message.startswith(f"config.{key} = {value!r}: must be one of ")
    listed = {"cipo.loss": "dpo, ipo, simpo", "model.dtype": "float32, bfloat16"}
    assert message.endswith(listed.get(key, "constant, linear, cosine"))


@pytest.mark.parametrize("value", [1, "x", None, [1]])
def test_a_group_is_no_value(value):
    assert _message("train", value) == "config.train: is a group of settings, not a value"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"mesh": {"data": -1, "fsdp": -1}}, "config.mesh"),
        ({"mesh": {"fsdp": -1}}, "config.mesh"),
        ({"mesh": {"tensor": 0}}, "config.mesh.tensor"),
        ({"mesh": {"data": 0}}, "config.mesh.data"),
        ({"train": {"batch": 6, "accumulation": 4}}, "config.train.batch = 6"),
        ({"warmup": {"retain_batch": 3, "accumulation": 2}}, "config.warmup.retain_batch = 3"),
        ({"cipo": {"beta": -0.1}}, "config.cipo.beta"),
        # Adam's bias correction would divide by zero.
        ({"train": {"b1": 1.0}}, "config.train.b1"),
        ({"warmup": {"b2": 1.0}}, "config.warmup.b2"),
    ],
)
def test_impossible_settings_are_refused(values, named):
    with pytest.raises(UserError) as caught:
        parse(Config, values)
    assert str(caught.value).startswith(named)


def test_one_axis_of_the_mesh_may_be_the_rest():
    mesh = parse(Config, {"mesh": {"data": 1, "fsdp": -1}}).mesh
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (1, -1, 1)


PROMPTS = ["target_prompt", "backward_prompt", "alternative_prompt", "boundary_prompt"]


@pytest.mark.parametrize("key", PROMPTS)
def test_a_prompt_needs_the_question(key):
    message = _message(f"counterfactual.{key}", "Say {answer}.")
    assert message == f"config.counterfactual.{key}: lacks {{question}}"


@pytest.mark.parametrize("text", ["Q? It is {answer}.", "Why {{question}}?"])
def test_a_prompt_that_only_looks_as_if_it_had_the_question(text):
    assert "lacks {question}" in _message("counterfactual.backward_prompt", text)


@pytest.mark.parametrize(
    "text",
    [
        "{question} {name}",
        "{question} {0}",
        "{question} {}",
        "{question} {",
        "{question} {answer!z}",
        "{question} {answer:d}",
        "{question} {answer.text}",
        "{question} {answer[text]}",
    ],
)
def test_a_prompt_that_cannot_be_filled_is_refused(text):
    message = _message("counterfactual.backward_prompt", text)
    assert message.startswith("config.counterfactual.backward_prompt: cannot be filled")


def test_a_prompt_may_hold_the_placeholders_in_any_order_and_escaped_braces():
    text = '{answer}: {question} {{"json": 1}} {question}'
    config = parse(Config, {"counterfactual": {"backward_prompt": text}})
    assert config.counterfactual.backward_prompt == text


@pytest.mark.parametrize(
    ("key", "value"),
    [("people", 59), ("people", 1025), ("strangers", 0), ("vocab_size", 299), ("people", 64.0)],
)
def test_pretraining_settings_are_checked(key, value):
    assert _message(key, value, PretrainConfig).startswith(f"config.{key} = {value!r}: ")


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="heads"):
        parse(PretrainConfig, {"heads": 3, "kv_heads": 2})


def test_flatten_reads_dataclasses_config_dicts_and_dicts():
    assert flatten({"a": {"b": 1}, "c": ConfigDict({"d": "x"})}) == {"a.b": 1, "c.d": "x"}
    assert flatten(Config()) == flatten(default_config())
    assert flatten(Config())["counterfactual.candidates"] == 6


def _load(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_configs():
    assert {"quickstart", "tiny_pretrain"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_that_ships_parses(path):
    module = _load(path)
    cls = PretrainConfig if path.stem == "tiny_pretrain" else Config
    parsed = parse(cls, module.get_config())
    assert parsed != cls()
    assert parse(cls, to_config_dict(parsed)) == parsed
    assert f"configs/{path.name}" in module.__doc__
