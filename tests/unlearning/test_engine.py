"""What is off is refused before any weight is read."""

import json

import pytest
from cipo_jax.unlearning.engine import Engine

from cipo_jax.config import Config, default_config, parse
from cipo_jax.errors import UserError
from cipo_jax.progress import Reporter


def opened(tmp_path, **changes):
    config = default_config()
    with config.unlocked():
        config.update_from_flattened_dict(
            {"mesh.data": 8, "data.valid_rows": 4, "forget.count": 1} | changes
        )
    return Engine.open(parse(Config, config), str(tmp_path / "run"), Reporter(quiet=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.max_prompt_tokens": 4}, "config.data.max_prompt_tokens is 4"),
        ({"data.max_completion_tokens": 8}, "config.data.max_completion_tokens is 8"),
        ({"train.batch": 12}, "config.train.batch = 12: must be a multiple of 8"),
        ({"train.accumulation": 2, "train.reasoning_batch": 8}, "config.train.reasoning_batch"),
        ({"mesh.data": 2, "mesh.tensor": 4}, "config.mesh.tensor = 4 does not divide parameter"),
        ({"mesh.data": 3}, "does not cover the 8 devices"),
        ({"model.path": "/no/such/folder"}, "/no/such/folder/config.json: no such file"),
        ({"data.forget": "x.jsonl"}, "config.data.forget and config.data.world are both given"),
        ({"forget.people": "Nobody Atall"}, "nobody is called 'Nobody Atall'"),
    ],
)
def test_a_bad_setting_is_named(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        opened(tmp_path, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_good_one_opens_and_writes_its_config(tmp_path):
    engine = opened(tmp_path)
    saved = json.loads((engine.folder.path / "config.json").read_text())
    assert saved["mesh"]["data"] == 8
    assert len(engine.splits.forget) == 42


def test_keys_are_addressed_by_name_and_seed(tmp_path):
    import jax

    engine = opened(tmp_path)
    data = jax.random.key_data
    assert (data(engine.key("rollouts", 1)) == data(engine.key("rollouts", 1))).all()
    assert (data(engine.key("rollouts", 1)) != data(engine.key("rollouts", 2))).any()
    assert (data(engine.key("rollouts", 1)) != data(engine.key("targets", 1))).any()
