"""docs/adding_a_method.md, as a reader would follow it."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cipo_jax.unlearning import methods

from cipo_jax.config import BaselineConfig, Config
from cipo_jax.data.batches import TokenizedExample, collate, shape_of
from cipo_jax.errors import UserError
from cipo_jax.models.decoder import Compute, DecoderConfig, init_params
from cipo_jax.training.step import Policy

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"
SHAPE = DecoderConfig(64, 16, 32, 2, 2, 1, 8)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    (tmp_path / "my_methods.py").write_text(code[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_methods"
    sys.modules.pop("my_methods", None)
    methods.METHODS.pop("unlikelihood", None)


def test_the_example_is_a_method_of_the_engine(plugin):
    config = methods.configured(Config(method="unlikelihood", plugins=plugin))
    assert methods.find(config.method).about == "unlikelihood training"
    objective = methods.objective_of("unlikelihood", BaselineConfig(retain="none"))
    rows = [TokenizedExample([1, 2, 3], [4, 5, 6, 7]), TokenizedExample([8], [9, 10])]
    batch = {"forget": jax.tree.map(jnp.asarray, collate(rows, shape_of(rows)))}
    policy, params = Policy(SHAPE, Compute()), init_params(SHAPE, jax.random.key(0))

    def of(params):
        return objective(policy, params, batch)[0]

    loss, gradient = jax.jit(jax.value_and_grad(of))(params)
    logps = np.asarray(policy.completion_logps(params, batch["forget"]))
    mask = batch["forget"].mask
    np.testing.assert_allclose(loss, -np.log(1 - np.exp(logps[mask])).mean(), rtol=1e-5)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(UserError, match="'no_such_module' cannot be imported"):
        methods.configured(Config(plugins="no_such_module"))
