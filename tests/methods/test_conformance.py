"""Every method that trains anything passes the conformance battery."""

import dataclasses

import jax.numpy as jnp
import pytest
from conformance import (
    LORA,
    Case,
    batch,
    cases,
    check_conformance,
    content_of_padding,
    first_step,
    mean_of_halves,
    mesh_and_micro_batches,
    order_of_rows,
    same,
    small_config,
    train_step,
)

from cipo_jax.methods.cipo.config import CipoConfig
from cipo_jax.methods.objective import FixedTargetObjective, ForgetLoss
from cipo_jax.methods.registry import METHODS
from cipo_jax.methods.retain import NoRetain
from cipo_jax.models.lora import Lora
from cipo_jax.training.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_updates")

TRAINED = [name for name, method in METHODS.items() if method.trains]


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_conforms(name):
    check_conformance(METHODS[name], small_config())


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_every_preference_loss_conforms(loss):
    check_conformance(METHODS["cipo"], small_config(cipo=CipoConfig(loss=loss)))


def test_only_rmu_and_r2mu_refuse_adapters():
    parts = {name: case.part for name in TRAINED for case in cases(METHODS[name], small_config())}
    adapters = Lora.from_config(LORA)
    assert {name for name, part in parts.items() if part != adapters} == {"rmu", "r2mu"}


# A tensor axis of 8 would have to divide the heads.
@pytest.mark.slow
@pytest.mark.parametrize("layout", [(8, 1, 1), (1, 8, 1), (4, 1, 2), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_every_method_on_every_mesh(name, layout):
    assert make_mesh(*layout).devices.size == 8
    for case in cases(METHODS[name], small_config()):
        plain = first_step(case, train_step(case), batch(case))
        same(first_step(case, train_step(case, layout), batch(case)), plain)


# ---- the battery finds what is wrong


@dataclasses.dataclass(frozen=True)
class Broken(ForgetLoss):
    """A mean of log-probabilities with a mistake."""

    mistake: str

    def __call__(self, policy, params, batch, context):
        rows = batch["forget"]
        logps = policy.completion_logps(params, rows)
        real = jnp.where(rows.mask, logps, 0.0)
        if self.mistake == "padding":
            return jnp.mean(logps), {}
        if self.mistake == "order":
            return jnp.sum(real * jnp.arange(len(logps))[:, None]), {}
        if self.mistake == "sum":
            return jnp.sum(jnp.sum(real, axis=0) ** 2), {}
        # The divisor of a micro-batch is not that of the batch.
        return jnp.sum(real) / jnp.sum(rows.mask), {}


@pytest.mark.parametrize(
    ("mistake", "check"),
    [
        ("padding", content_of_padding),
        ("order", order_of_rows),
        ("sum", mean_of_halves),
        ("divisor", mesh_and_micro_batches),
    ],
)
def test_a_mistake_is_found(mistake, check):
    objective = FixedTargetObjective(Broken(mistake), NoRetain())
    case = Case(objective, ("forget",), None)
    step = train_step(case)
    plain = first_step(case, step, batch(case))
    with pytest.raises(AssertionError):
        check(case, step, plain)
