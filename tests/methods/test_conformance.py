"""Every method that trains anything passes the conformance battery."""

import pytest
from conformance import check_conformance, small_config

from cipo_jax.methods.cipo.config import CipoConfig
from cipo_jax.methods.registry import METHODS

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_updates")

TRAINED = [name for name, method in METHODS.items() if method.trains]


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_conforms(name):
    check_conformance(METHODS[name], small_config())


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_every_preference_loss_conforms(loss):
    check_conformance(METHODS["cipo"], small_config(cipo=CipoConfig(loss=loss)))
