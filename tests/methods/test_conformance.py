"""Every method that trains anything passes the conformance battery."""

import functools

import jax
import pytest
from conformance import check_conformance, small_config
from quick_options import QUICK

from cipo_jax.methods.cipo.config import CipoConfig
from cipo_jax.methods.registry import METHODS
from cipo_jax.training import step
from cipo_jax.training.mesh import replicated

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_updates")

TRAINED = [name for name, method in METHODS.items() if method.trains]


@pytest.fixture(scope="module")
def quick_updates():
    """The update with options that shorten compilation; shapes are computed once."""

    def jitted(self, state):
        shardings = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(
            step._update,
            static_argnames="step",
            donate_argnames="state",
            out_shardings=(shardings, replicated(self.mesh)),
            compiler_options=QUICK,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.TrainStep, "_jitted", jitted)
        patch.setattr(step, "abstract_trainable", functools.cache(step.abstract_trainable))
        yield


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_conforms(name):
    check_conformance(METHODS[name], small_config())


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_every_preference_loss_conforms(loss):
    check_conformance(METHODS["cipo"], small_config(cipo=CipoConfig(loss=loss)))
