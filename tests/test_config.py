import dataclasses
import json
import math
import warnings

import pytest
from ml_collections import ConfigDict

from cipo_jax.config import (
    Config,
    PretrainConfig,
    RowLrs,
    RowOverrides,
    Variant,
    compared_config,
    default_config,
    flatten,
    nearest,
    parse,
    parse_arg,
    tiny_config,
    to_config_dict,
    with_changes,
)
from cipo_jax.errors import UserError
from cipo_jax.legacy import LEGACY
from cipo_jax.settings import RenamedSetting, find_setting
from cipo_jax.settings_text import from_text, to_literal


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
    config.forget.people = ("Ada Brandt",)
    config.mesh.fsdp = 2
    parsed = parse(Config, config)
    assert (parsed.train.lr, parsed.cipo.loss) == (3e-4, "simpo")
    assert (parsed.forget.people, parsed.mesh.fsdp) == (("Ada Brandt",), 2)
    assert parse(Config, to_config_dict(parsed)) == parsed
    assert parsed.warmup == Config().warmup


def test_default_config_is_locked():
    config = default_config()
    with pytest.raises((KeyError, AttributeError), match="lrx"):
        config.train.lrx = 1.0
    with pytest.raises(TypeError):
        config.train.batch_size = "many"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.lrx", "train.lr"),
        ("train.batchsize", "train.batch_size"),
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
        ("train.batch_size", 1.5, "int"),
        ("train.batch_size", 16.0, "int"),
        ("train.batch_size", True, "int"),
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
        ("train.batch_size", 0, "at least 1"),
        ("train.batch_size", -1, "at least 1"),
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
def test_a_number_must_be_finite(key, value):
    assert _message(key, value).startswith(f"config.{key} = {value!r}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cipo.loss", "dop"),
        ("cipo.loss", 1),
        ("cipo.loss", None),
        ("model.dtype", "float16"),
        ("train.lr_schedule", "Linear"),
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
        (
            {"train": {"batch_size": 6, "gradient_accumulation_steps": 4}},
            "config.train.batch_size = 6",
        ),
        (
            {"warmup": {"retain_batch_size": 3, "gradient_accumulation_steps": 2}},
            "config.warmup.retain_batch_size = 3",
        ),
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
    assert flatten(Config())["counterfactual.num_candidates"] == 6


# ---- every setting


def _settings(cls=Config):
    return {key: find_setting(cls, key) for key in flatten(cls())}


@pytest.mark.parametrize("cls", [Config, PretrainConfig])
def test_every_setting_has_a_meaning_in_one_line(cls):
    for key, (_, metadata) in _settings(cls).items():
        assert metadata["about"], key
        assert "\n" not in metadata["about"], key


def test_the_root_config_has_groups_of_its_own_beside_the_shared_ones():
    groups = {key.split(".")[0] for key in flatten(Config()) if "." in key}
    assert {"model", "train", "selection", "cipo", "fixed_target", "npo", "compare"} <= groups
    assert "baseline" not in groups


@pytest.mark.parametrize("key", flatten(Config()))
def test_a_default_survives_the_command_line(key):
    hint, _ = find_setting(Config, key)
    default = flatten(Config())[key]
    text = to_literal(default) if not isinstance(default, str) else default
    assert with_changes(Config(), [(key, from_text(hint, text))]) == Config()


# ---- None for the method's default


OPTIONAL = ["cipo.beta", "fixed_target.retain_weight", "npo.beta", "gradient_ascent.beta"]


@pytest.mark.parametrize("key", OPTIONAL)
def test_none_is_the_default_and_a_number_may_be_asked_for(key):
    group, name = key.split(".")
    assert flatten(Config())[key] is None
    config = default_config()
    config[group][name] = 3  # A placeholder knows its type, so that this is a float.
    assert flatten(parse(Config, config))[key] == 3.0
    config[group][name] = None
    assert parse(Config, config) == Config()
    with pytest.raises(TypeError):
        config[group][name] = "x"
    assert _message(key, "x") == f"config.{key} = 'x': must be of type float, or None"


def test_a_weight_of_zero_may_be_asked_for():
    config = default_config()
    config.fixed_target.retain_weight = config.fixed_target.forget_weight = 0.0
    parsed = parse(Config, config).fixed_target
    assert (parsed.retain_weight, parsed.forget_weight) == (0.0, 0.0)


def test_a_choice_may_be_none_beside_the_choice_none():
    assert parse(Config, {"fixed_target": {"retain": "none"}}).fixed_target.retain == "none"
    assert parse(Config, {"fixed_target": {"retain": None}}).fixed_target.retain is None
    message = _message("fixed_target.retain", "own")
    assert message.endswith("must be one of none, nll, kl, kd, hidden, or None")


def test_settings_without_a_method_default_are_not_none():
    for key in ("preference.beta", "distillation.beta", "train.lr", "cipo.loss"):
        assert f"config.{key} = None: " in _message(key, None)


# ---- tuples and rows


def test_a_tuple_may_be_written_as_a_list():
    config = default_config()
    config.forget.people = ["Ada Brandt", "Hugo Vance"]
    config.representation.layers = (1, 2)
    parsed = parse(Config, config)
    assert parsed.forget.people == ("Ada Brandt", "Hugo Vance")
    assert parsed.representation.layers == (1, 2)
    assert parse(Config, {"plugins": ["a.b"]}).plugins == ("a.b",)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("forget.people", 3, "config.forget.people = 3: must be a tuple of str"),
        ("forget.people", (3,), "config.forget.people[0] = 3: must be of type str"),
        (
            "representation.layers",
            (1, -1),
            "config.representation.layers[1] = -1: must be at least",
        ),
        ("representation.layers", (1, 2.0), "config.representation.layers[1] = 2.0: must be of"),
        ("compare.lrs", (1e-3, 0.0), "config.compare.lrs[1] = 0.0: must be above 0"),
        ("compare.lrs", (1e-3, math.nan), "config.compare.lrs[1] = nan: is not a number"),
        ("compare.variants", (("x", 3),), "config.compare.variants[0].changes = 3: must be a dict"),
        (
            "compare.variants",
            ("x", {}),
            "config.compare.variants[0] = 'x': must be (name, changes)",
        ),
        ("compare.row_lrs", ((("a",), (-1.0,)),), "config.compare.row_lrs[0].lrs[0] = -1.0: must"),
        (
            "compare.overrides",
            (("rmu", {}),),
            "config.compare.overrides[0].rows = 'rmu': must be a",
        ),
        (
            "compare.variants",
            (("x", {"cipo.nl_weight": 0.0}),),
            "config.compare.variants: row 'x': config.cipo.nl_weight: no such setting; nearest: "
            "cipo.nll_weight",
        ),
        (
            "compare.overrides",
            ((("pdu",), {"train.lr": -1.0}),),
            "config.compare.overrides: row 'pdu': config.train.lr = -1.0: must be at least 0",
        ),
    ],
)
def test_a_wrong_tuple_or_row_is_named(key, value, said):
    assert _message(key, value).startswith(said)


def _with_rows():
    config = compared_config()
    config.compare.variants = (
        ("no NLL", {"cipo.nll_weight": 0.0, "method": "cipo_simpo"}),
        ("lower layers", {"representation.layers": [1, 2]}),
    )
    config.compare.overrides = ((("rmu", "r2mu"), {"fixed_target.retain_weight": 1.4}),)
    config.compare.row_lrs = ((("simnpo", "satimp"), (8e-4, 3.2e-3)),)
    config.compare.lrs = (2e-4,)
    config.forget.people = ("Ada Brandt", "Hugo Vance")
    config.representation.layers = (1, 2)
    config.npo.beta = 1.0
    return config


def test_rows_may_be_written_as_lists():
    config = default_config()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.compare.variants = [["x", {"train.lr": 1e-3}]]
        variants = parse(Config, config).compare.variants
    assert variants == (Variant("x", (("train.lr", 1e-3),)),)


def test_rows_are_dataclasses():
    compare = parse(Config, _with_rows()).compare
    first, second = compare.variants
    assert first == Variant("no NLL", (("cipo.nll_weight", 0.0), ("method", "cipo_simpo")))
    assert second.changes == (("representation.layers", (1, 2)),)
    assert compare.overrides == (
        RowOverrides(("rmu", "r2mu"), (("fixed_target.retain_weight", 1.4),)),
    )
    assert compare.row_lrs == (RowLrs(("simnpo", "satimp"), (8e-4, 3.2e-3)),)


def test_a_whole_config_survives_json_and_a_config_dict():
    parsed = parse(Config, _with_rows())
    stored = json.loads(json.dumps(dataclasses.asdict(parsed)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse(Config, stored) == parsed
        assert parse(Config, to_config_dict(parsed)) == parsed


def test_a_config_is_hashable_and_equal_by_value():
    first, second = (parse(Config, _with_rows()) for _ in range(2))
    assert first is not second
    assert (first, hash(first)) == (second, hash(second))
    assert first != parse(Config, compared_config())
    assert len({Config(), parse(Config, default_config())}) == 1


def test_a_literal_is_what_a_config_file_writes():
    compare = parse(Config, _with_rows()).compare
    rows = eval(to_literal(compare.variants), {})
    assert rows[0] == ("no NLL", {"cipo.nll_weight": 0.0, "method": "cipo_simpo"})
    assert parse(Config, {"compare": {"variants": rows}}).compare.variants == compare.variants
    assert to_literal((1e-3,)) == "(0.001,)"


def test_changes_are_applied_and_checked():
    changed = with_changes(Config(), (("train.lr", 1), ("seed", 3), ("npo.beta", None)))
    assert (changed.train.lr, changed.seed, changed.npo.beta) == (1.0, 3, None)
    assert type(changed.train.lr) is float
    assert changed.warmup == Config().warmup
    with pytest.raises(UserError, match=r"config\.train: is a group"):
        with_changes(Config(), (("train", 1),))
    with pytest.raises(UserError, match=r"config\.train\.lrs: no such setting; nearest: train\.lr"):
        with_changes(Config(), (("train.lrs", 1),))
    with pytest.raises(UserError, match="not a multiple"):
        with_changes(Config(), (("train.gradient_accumulation_steps", 3),))


def test_one_config_dict_updates_another():
    config = default_config()
    config.update(tiny_config())  # Placeholders, which ml_collections would not update.
    assert parse(Config, config) == parse(Config, tiny_config())
    config.update({"npo": {"beta": 2.0}})
    assert config.npo.beta == 2.0


# ---- text


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("forget.people", "Ada Brandt, Hugo Vance", ("Ada Brandt", "Hugo Vance")),
        ("forget.people", "('Ada Brandt', 'Hugo Vance')", ("Ada Brandt", "Hugo Vance")),
        ("forget.people", "['Ada Brandt']", ("Ada Brandt",)),
        ("forget.people", "", ()),
        ("compare.lrs", "1e-3,2", (1e-3, 2.0)),
        ("representation.layers", "5, 6,7", (5, 6, 7)),
        ("representation.layers", "None", None),
        ("npo.beta", "None", None),
        ("npo.beta", "2", 2.0),
        ("fixed_target.retain", "none", "none"),
        ("fixed_target.retain", "None", None),
        ("data.world", "None", "None"),
        ("lora.rank_stabilized", "true", True),
        ("compare.keep_models", "False", False),
        ("compare.row_lrs", "((('a', 'b'), (1e-3,)),)", ((("a", "b"), (1e-3,)),)),
        ("compare.variants", "[('x', {'seed': 1})]", (("x", {"seed": 1}),)),
    ],
)
def test_text_is_read_by_the_type_of_the_setting(key, text, value):
    assert from_text(find_setting(Config, key)[0], text) == value


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("train.lr", "abc", "must be of type float"),
        ("npo.beta", "none", "must be of type float or None"),
        ("train.batch_size", "1.5", "must be of type int"),
        ("compare.keep_models", "maybe", "must be true or false"),
        ("compare.lrs", "1e-3, x", "must be a tuple of float, comma-separated"),
        ("compare.lrs", "(1e-3", "must be a tuple of float, as Python writes it"),
        ("compare.variants", "x", "must be a tuple of (name, changes), as Python writes it"),
    ],
)
def test_text_of_another_type_is_refused(key, text, said):
    with pytest.raises(ValueError, match="must") as caught:
        from_text(find_setting(Config, key)[0], text)
    assert str(caught.value) == said


def _arg(text):
    return parse_arg(
        text, model=("small", "large"), split="forget10", lora=False, rank=8, scale=1.0
    )


def test_a_config_argument_has_the_types_of_its_defaults():
    assert _arg(None) == _arg("")
    assert dict(_arg(None)) == {
        "model": "small", "split": "forget10", "lora": False, "rank": 8, "scale": 1.0
    }  # fmt: skip
    arg = _arg("model=large, lora,rank=16,split=/a/b:c,scale=2")
    assert dict(arg) == {
        "model": "large", "split": "/a/b:c", "lora": True, "rank": 16, "scale": 2.0
    }  # fmt: skip
    assert type(arg.scale) is float
    assert _arg("lora=false").lora is False
    with pytest.raises(AttributeError):
        arg.other = 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modl=large", "config argument 'modl=large': no such key; nearest: model"),
        ("large", "config argument 'large': no such key; nearest: "),
        ("rank", "config argument 'rank': write rank=VALUE"),
        ("rank=x", "config argument 'rank=x': must be of type int"),
        ("lora=maybe", "config argument 'lora=maybe': must be true or false"),
        ("model=medium", "config argument 'model=medium': must be one of small, large"),
    ],
)
def test_a_wrong_config_argument_is_named(text, said):
    with pytest.raises(UserError) as caught:
        _arg(text)
    assert str(caught.value).startswith(said)
    with pytest.raises(UserError, match="takes none"):
        parse_arg(text)


# ---- old names


def _translated(key, value):
    """What an old key gives in JSON or a plain dict, and in a config file that sets it."""
    with pytest.warns(RenamedSetting) as seen:
        parsed = parse(Config, _nested(key, value))
    config = default_config()
    *groups, name = key.split(".")
    at = config
    for part in groups:
        at = at[part]
    with pytest.warns(RenamedSetting):
        at[name] = value
    assert parse(Config, config) == parsed
    assert all("\n" not in str(w.message) for w in seen)
    return parsed, [str(w.message) for w in seen]


@pytest.mark.parametrize(
    ("old", "value", "new", "expected"),
    [
        ("train.batch", 8, "train.batch_size", 8),
        ("warmup.retain_batch", 8, "warmup.retain_batch_size", 8),
        ("train.reasoning_batch", 4, "train.reasoning_batch_size", 4),
        ("train.accumulation", 2, "train.gradient_accumulation_steps", 2),
        ("warmup.decay", "cosine", "warmup.lr_schedule", "cosine"),
        ("train.clip", 0.5, "train.max_grad_norm", 0.5),
        ("sampling.rows", 7, "sampling.max_batch_size", 7),
        ("sampling.chunk", 7, "sampling.decode_chunk", 7),
        ("eval.rows", 7, "eval.max_batch_size", 7),
        ("counterfactual.candidates", 7, "counterfactual.num_candidates", 7),
        ("lora.targets", "q_proj, v_proj", "lora.target_modules", ("q_proj", "v_proj")),
        ("lora.rank_stabilised", True, "lora.rank_stabilized", True),
        ("cipo.samples", 7, "cipo.num_samples", 7),
        ("cipo.leak_goal", 0.5, "selection.leak_goal", 0.5),
        ("cipo.patience", 7, "selection.patience", 7),
        ("baseline.rounds", 7, "fixed_target.rounds", 7),
        ("baseline.span", "cot", "fixed_target.span", "cot"),
        ("baseline.retain", "kl", "fixed_target.retain", "kl"),
        ("baseline.retain", "none", "fixed_target.retain", "none"),
        ("baseline.forget_weight", 0.5, "fixed_target.forget_weight", 0.5),
        ("baseline.retain_weight", 0.5, "fixed_target.retain_weight", 0.5),
        ("baseline.importance", 0.5, "gradient_ascent.importance", 0.5),
        ("baseline.delta", 0.5, "npo.delta", 0.5),
        ("baseline.alpha", 0.5, "refusal.alpha", 0.5),
        ("baseline.temperature", 2.0, "fixed_target.temperature", 2.0),
        ("baseline.epsilon", 0.5, "pdu.epsilon", 0.5),
        ("baseline.dual_lr", 0.5, "pdu.dual_lr", 0.5),
        ("baseline.scale", 3.0, "representation.scale", 3.0),
        ("baseline.layers", "5-7", "representation.layers", (5, 6, 7)),
        ("baseline.layers", "3,0", "representation.layers", (0, 3)),
        ("baseline.targets", "q_proj", "representation.target_modules", ("q_proj",)),
        ("baseline.trace_weight", 0.5, "representation.trace_weight", 0.5),
        ("baseline.reasoning_weight", 0.5, "representation.reasoning_weight", 0.5),
        ("baseline.trace_tokens", 7, "representation.trace_tokens", 7),
        ("baseline.alternates", 7, "preference.num_alternates", 7),
        ("baseline.refusals", "a.jsonl", "refusal.path", "a.jsonl"),
        ("forget.people", "A B, C D", "forget.people", ("A B", "C D")),
        ("forget.earlier", "A B", "forget.earlier", ("A B",)),
        ("plugins", "a.b,c", "plugins", ("a.b", "c")),
        ("compare.methods", "npo, ga", "compare.methods", ("npo", "ga")),
        ("compare.lrs", "2e-4, 8e-4", "compare.lrs", (2e-4, 8e-4)),
    ],
)
def test_an_old_key_is_read_with_a_warning(old, value, new, expected):
    parsed, said = _translated(old, value)
    assert flatten(parsed)[new] == expected
    assert f"config.{new}" in said[0]
    changed = {k for k, v in flatten(parsed).items() if v != flatten(Config())[k]}
    assert changed == {new}


def test_the_old_layer_is_that_of_rmu_and_of_hidden_states_that_are_retained():
    parsed, said = _translated("baseline.layer", 3)
    assert (parsed.representation.layer, parsed.fixed_target.layer) == (3, 3)
    assert "config.representation.layer, config.fixed_target.layer" in said[0]


@pytest.mark.parametrize(
    ("old", "value"),
    [
        ("cipo.beta", 0.0),
        ("baseline.retain", "own"),
        ("baseline.forget_weight", 0.0),
        ("baseline.retain_weight", 0),
        ("baseline.beta", 0.0),
        ("baseline.layers", ""),
        ("forget.people", ""),
        ("compare.methods", "all"),
        ("compare.lrs", ""),
        ("compare.variants", ""),
        ("compare.own", ""),
        ("lora.targets", "all-linear"),
    ],
)
def test_an_old_default_is_todays_default(old, value):
    assert _translated(old, value)[0] == Config()


def test_an_old_key_may_have_several_places():
    parsed, said = _translated("baseline.beta", 0.7)
    places = ("gradient_ascent.beta", "npo.beta", "preference.beta", "distillation.beta")
    assert [flatten(parsed)[key] for key in places] == [0.7] * 4
    assert all(f"config.{key}" in said[0] for key in places)


def test_old_rows_were_lines_of_text():
    variants = "no NLL: cipo.nll_weight=0, cipo.samples=3\n\n all: cipo.reject=all, method=npo"
    parsed = _translated("compare.variants", variants)[0].compare
    assert parsed.variants == (
        Variant("no NLL", (("cipo.nll_weight", 0), ("cipo.num_samples", 3))),
        Variant("all", (("cipo.reject", "all"), ("method", "npo"))),
    )
    own = "rmu, r2mu: baseline.retain_weight=1.4\npdu: baseline.layers=5-7"
    parsed = _translated("compare.own", own)[0].compare
    assert parsed.overrides == (
        RowOverrides(("rmu", "r2mu"), (("fixed_target.retain_weight", 1.4),)),
        RowOverrides(("pdu",), (("representation.layers", (5, 6, 7)),)),
    )
    parsed = _translated("compare.lrs", "2e-4; a, b: 1e-3, 1e-2; c: 1")[0].compare
    assert parsed.lrs == (2e-4,)
    assert parsed.row_lrs == (RowLrs(("a", "b"), (1e-3, 1e-2)), RowLrs(("c",), (1.0,)))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("compare.variants", "x cipo.loss=ipo", "is not of the form 'name: key=value, key=value'"),
        ("compare.own", "rmu, r2mu", "is not of the form 'row, row: key=value, key=value'"),
        ("compare.lrs", "1e-3, x", "must be numbers above 0, comma-separated"),
        ("compare.lrs", "1e-3; a:", "is not of the form 'row, row: 1e-3, 1e-2'"),
        ("baseline.layers", "5-", "write 5-7, or 0,3"),
    ],
)
def test_old_text_that_cannot_be_read_is_named(key, value, said):
    message = _message(key, value)
    assert message.startswith((f"config.{key}: ", f"config.{key} = "))
    assert said in message


def test_old_keys_inside_of_rows_are_read():
    config = default_config()
    with pytest.warns(RenamedSetting, match=r"config\.baseline\.retain_weight is now"):
        config.compare.overrides = ((("pdu",), {"baseline.retain_weight": 1.0}),)
    (row,) = parse(Config, config).compare.overrides
    assert row.changes == (("fixed_target.retain_weight", 1.0),)


def test_old_values_are_checked_under_the_new_name():
    with pytest.warns(RenamedSetting):
        message = _message("train.batch", 0)
    assert message == "config.train.batch_size = 0: must be at least 1"
    config = default_config()
    with pytest.warns(RenamedSetting), pytest.raises(TypeError, match="batch_size"):
        config.train.batch = "many"
    with pytest.raises((KeyError, AttributeError), match="rond"):
        config.baseline.rond = 1


def test_every_old_key_leads_to_keys_that_there_are():
    known = flatten(Config())
    for old, convert in LEGACY.items():
        assert set(convert("")) <= set(known), old
    assert set(PretrainConfig.legacy) < set(LEGACY)
    with pytest.warns(RenamedSetting):
        assert parse(PretrainConfig, {"train": {"batch": 8}}).train.batch_size == 8
