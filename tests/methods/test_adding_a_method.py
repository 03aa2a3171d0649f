"""docs/adding_a_method.md, as a reader would follow it."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import check_conformance

from cipo_jax.config import Config
from cipo_jax.data.batches import PadShape, TokenizedExample, collate
from cipo_jax.errors import UserError
from cipo_jax.methods.fixed_target import FixedTargetConfig
from cipo_jax.methods.objective import ForgetLoss
from cipo_jax.methods.registry import METHODS, find, import_plugins, resolve_method
from cipo_jax.models.decoder import Compute, DecoderConfig, init_params
from cipo_jax.settings import group, setting
from cipo_jax.training.objective import StepContext
from cipo_jax.training.policy import Policy

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"
DECODER = DecoderConfig(64, 16, 32, 2, 2, 1, 8)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    (tmp_path / "my_methods.py").write_text(code[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_methods"
    sys.modules.pop("my_methods", None)
    METHODS.pop("unlikelihood", None)


def test_the_example_is_a_method_of_the_engine(plugin):
    method, config = resolve_method(Config(method="unlikelihood", plugins=(plugin,)))
    assert method is find("unlikelihood") and method.about == "unlikelihood training"
    none = Config(fixed_target=FixedTargetConfig(retain="none"))
    assert (method.retains(config), method.retains(none)) == (True, False)
    objective = method.objective(none)
    rows = [TokenizedExample([1, 2, 3], [4, 5, 6, 7]), TokenizedExample([8], [9, 10])]
    batch = {"forget": jax.tree.map(jnp.asarray, collate(rows, PadShape.fitting(rows)))}
    policy, params = Policy(DECODER, Compute()), init_params(DECODER, jax.random.key(0))

    def of(params):
        return objective(policy, params, batch, StepContext())[0]

    loss, gradient = jax.jit(jax.value_and_grad(of))(params)
    logps = np.asarray(policy.completion_logps(params, batch["forget"]))
    mask = batch["forget"].mask
    np.testing.assert_allclose(loss, -np.log(1 - np.exp(logps[mask])).mean(), rtol=1e-5)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_the_example_conforms(plugin, quick_updates):
    import_plugins(Config(plugins=(plugin,)))
    check_conformance(find("unlikelihood"))


@dataclasses.dataclass(frozen=True)
class MyConfig:
    """A group of settings of a plugin."""

    largest: float = setting(0.9, "a setting", 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class ConfigWithMine(Config):
    """A config that has it."""

    mine: MyConfig = group(MyConfig)


def test_a_plugin_may_have_a_group_of_its_own(plugin):
    import_plugins(Config(plugins=(plugin,)))
    kind = type(find("unlikelihood").objective(Config()).forget)
    made = dataclasses.replace(
        find("unlikelihood"), loss=lambda config: kind(config.group(MyConfig).largest)
    )
    assert made.objective(Config()).forget.largest == 0.9
    config = ConfigWithMine(mine=MyConfig(0.5))
    assert made.objective(config).forget.largest == 0.5
    assert made.configured(config) == config


def test_the_page_names_what_there_is():
    """Class attributes, fields and files that the page speaks of."""
    text = PAGE.read_text(encoding="utf-8")
    for name in re.findall(r"`(needs_\w+)`", text):
        assert getattr(ForgetLoss, name) is False
    for name in re.findall(r"`policy\.(\w+)", text):
        assert hasattr(Policy(DECODER, Compute()), name)
    for name in re.findall(r"`(methods/[\w/]+\.py)`", text):
        assert (PAGE.parents[1] / "cipo_jax" / name).is_file(), name
    for name in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (PAGE.parents[1] / name).is_file(), name


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(UserError, match="'no_such_module' cannot be imported"):
        resolve_method(Config(plugins=("no_such_module",)))
