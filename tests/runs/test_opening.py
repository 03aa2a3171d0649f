"""What is off is refused before any weight is read, and before there is a folder."""

import json

import jax
import pytest

from cipo_jax.config import Config, default_config, parse
from cipo_jax.errors import UserError
from cipo_jax.experiments.unlearn import derive_run, open_run
from cipo_jax.models.pretrained import PretrainedFolder
from cipo_jax.progress import Reporter


def configured(**changes):
    config = default_config()
    with config.unlocked():
        config.update_from_flattened_dict(
            {"mesh.data": 8, "data.valid_rows": 4, "forget.count": 1} | changes
        )
    return parse(Config, config)


def opened(tmp_path, **changes):
    return open_run(configured(**changes), tmp_path / "run", Reporter(quiet=True))


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def load_params(self, *args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(PretrainedFolder, "load_params", load_params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.max_prompt_tokens": 4}, "config.data.max_prompt_tokens is 4"),
        ({"data.max_completion_tokens": 8}, "config.data.max_completion_tokens is 8"),
        ({"train.batch_size": 12}, "config.train.batch_size = 12: must be a multiple of 8"),
        (
            {"train.gradient_accumulation_steps": 2, "train.reasoning_batch_size": 8},
            "config.train.reasoning_batch_size",
        ),
        ({"mesh.data": 2, "mesh.tensor": 4}, "config.mesh.tensor = 4 does not divide parameter"),
        ({"mesh.data": 3}, "does not cover the 8 devices"),
        ({"model.path": "/no/such/folder"}, "/no/such/folder/config.json: no such file"),
        ({"data.forget": "x.jsonl"}, "config.data.forget and config.data.world are both given"),
        ({"forget.people": ("Nobody Atall",)}, "nobody is called 'Nobody Atall'"),
        ({"method": "cippo"}, "config.method = 'cippo': no such method; nearest: cipo"),
        ({"plugins": ("no_such_module",)}, "config.plugins: 'no_such_module' cannot be imported"),
    ],
)
def test_a_bad_setting_is_named(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        opened(tmp_path, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_good_one_opens_and_writes_its_config(tmp_path):
    method, run = opened(tmp_path)
    assert method.name == "cipo"
    saved = json.loads((run.folder / "config.json").read_text())
    assert saved["mesh"]["data"] == 8
    data = run.workspace.data
    assert len(data.splits.forget) == len(data.forget) == 42
    assert data.valid.counts()["retain"] == data.valid.counts()["reasoning"] == 4


def test_keys_are_addressed_by_name_and_seed(tmp_path):
    _, run = opened(tmp_path)
    data = jax.random.key_data
    assert (data(run.key("rollouts", 1)) == data(run.key("rollouts", 1))).all()
    assert (data(run.key("rollouts", 1)) != data(run.key("rollouts", 2))).any()
    assert (data(run.key("rollouts", 1)) != data(run.key("targets", 1))).any()


def test_what_belongs_to_a_run_shares_its_samplers_and_its_data(tmp_path):
    _, run = opened(tmp_path)
    config = configured(**{"train.lr": 0.5, "method": "rmu", "representation.layer": 1})
    method, other = derive_run(run, config, tmp_path / "other")
    assert method.name == "rmu"
    assert other.preemption is run.preemption
    assert other.workspace.sampler is run.workspace.sampler
    assert other.workspace.eval_sampler is run.workspace.eval_sampler
    assert other.workspace.data is run.workspace.data
    assert other.workspace.model.trainable is not None
    assert run.workspace.model.trainable is None
    assert other.base.fingerprint == run.base.fingerprint
    config = configured(**{"forget.count": 2})
    _, other = derive_run(run, config, tmp_path / "more")
    assert other.workspace.sampler is run.workspace.sampler
    assert len(other.workspace.data.forget) == 84
    with pytest.raises(UserError, match=r"config\.train\.batch_size = 12"):
        derive_run(run, configured(**{"train.batch_size": 12}), tmp_path / "bad")
