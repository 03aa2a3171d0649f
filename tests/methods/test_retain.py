"""Retain terms: which one a config asks for, and weights of zero."""

import jax.numpy as jnp
import numpy as np
import pytest

from cipo_jax import losses
from cipo_jax.config import Config
from cipo_jax.data.batches import PadShape, TokenizedExample, collate
from cipo_jax.methods.fixed_target import FixedTargetConfig, hidden_term
from cipo_jax.methods.registry import METHODS
from cipo_jax.methods.representation import RepresentationConfig
from cipo_jax.methods.retain import (
    HiddenRetain,
    KdRetain,
    KlRetain,
    NllRetain,
    NoRetain,
    RetainTerm,
)
from cipo_jax.training.objective import StepContext


def term(name, **fixed):
    config = Config(
        fixed_target=FixedTargetConfig(**fixed),
        representation=RepresentationConfig(reasoning_weight=0.5),
    )
    made = METHODS[name].objective(config)
    return made.retain, made.retain_weight


def test_the_config_chooses_the_term():
    assert term("npo") == (NllRetain(), 1.0)
    assert term("npo", retain="none") == (NoRetain(), 1.0)
    assert term("npo", retain="kl", retain_weight=2.0) == (KlRetain(), 2.0)
    assert term("npo", retain="kd", temperature=3.0) == (KdRetain(3.0), 1.0)
    assert term("npo", retain="hidden") == (HiddenRetain(7, (1.0, 1.0)), 1.0)
    assert term("npo", retain="hidden", layer=3) == (HiddenRetain(3, (1.0, 1.0)), 1.0)
    assert term("rmu") == (HiddenRetain(7, (1.0, 0.5 / 1.4)), 1.4)
    assert term("rmu", retain="nll") == (NllRetain(), 1.4)


def test_a_retain_weight_of_zero_is_not_the_default():
    assert term("rmu", retain="nll", retain_weight=0.0) == (NllRetain(), 0.0)
    assert term("npo", retain_weight=0.0) == (NllRetain(), 0.0)
    assert term("pdu", retain_weight=0.0) == (NllRetain(), 0.0)
    made = METHODS["pdu"].objective(Config(fixed_target=FixedTargetConfig(retain_weight=0.0)))
    assert made.initial_aux_state() == {"dual": 0.0}


@pytest.mark.parametrize("name", ["rmu", "npo"])
def test_facts_of_weight_zero_leave_the_hidden_states_of_reasoning(name):
    found, weight = term(name, retain="hidden", retain_weight=0.0, layer=3)
    reasoning = 0.5 if name == "rmu" else 1.0
    assert (found, weight) == (HiddenRetain(3, (0.0, reasoning)), 1.0)
    values = {"retain": jnp.float32(7.0), "reasoning": jnp.float32(4.0)}
    assert weight * float(found.combined(values)) == pytest.approx(reasoning * 4.0)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.4])
def test_hidden_states_of_facts_and_of_reasoning_have_weights_of_their_own(weight):
    found, outer = hidden_term(2, 0.5, weight)
    values = {"retain": jnp.float32(7.0), "reasoning": jnp.float32(4.0)}
    wanted = weight * 7.0 + 0.5 * 4.0
    assert outer * float(found.combined(values)) == pytest.approx(wanted, rel=1e-6)
    alone = {"reasoning": values["reasoning"]}
    assert outer * float(found.combined(alone)) == pytest.approx(2.0, rel=1e-6)


class Lengths(RetainTerm):
    """The number of real tokens."""

    def of_group(self, policy, params, rows, context):
        return jnp.sum(rows.mask).astype(jnp.float32)


ROWS = [TokenizedExample([1], [2, 3]), TokenizedExample([4, 5], [6])]
BATCH = {"retain": collate(ROWS, PadShape(4, 2)), "reasoning": collate(ROWS[1:], PadShape(4, 2))}


def test_groups_weigh_the_same_and_are_reported_by_name():
    loss, metrics = Lengths()(None, None, BATCH, StepContext())
    assert float(loss) == pytest.approx((3 + 1) / 2)
    assert {k: float(v) for k, v in metrics.items()} == {
        "retain/retain": 3.0, "retain/reasoning": 1.0
    }  # fmt: skip
    loss, metrics = Lengths()(None, None, {"forget": BATCH["retain"]}, StepContext())
    assert (float(loss), metrics) == (0.0, {})


def test_nothing_is_looked_at_where_nothing_is_retained():
    loss, metrics = NoRetain()(None, None, BATCH, StepContext())
    assert (float(loss), metrics) == (0.0, {})
    assert not NoRetain().uses_data and not NoRetain().needs_reference_params
    assert not NllRetain().needs_reference_params and KlRetain().needs_reference_params


def test_means_over_tokens_leave_padding_out_and_can_share_a_divisor():
    rows = BATCH["retain"]
    values = jnp.where(rows.mask, jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.nan)
    assert float(losses.token_mean(values, rows.mask, rows.num_tokens)) == pytest.approx(3.0)
    shared = rows._replace(num_tokens=np.float32(4.5))
    assert float(losses.token_mean(values, shared.mask, shared.num_tokens)) == pytest.approx(2.0)
