"""Phases of other lengths and learning rates are one program, and still learn at their own rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilations import compiled
from trees import assert_trees_equal

from cipo_jax.config import (
    Config,
    FixedTargetConfig,
    GradientAscentConfig,
    TrainConfig,
)
from cipo_jax.methods.registry import find
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params
from cipo_jax.training.mesh import make_mesh
from cipo_jax.training.optimizer import AdamW, Schedule
from cipo_jax.training.step import Objective, Policy, TrainStep

CONFIG = DecoderConfig(
    vocab_size=16, d_model=8, d_ff=8, layers=1, heads=1, kv_heads=1, head_dim=8, tied_head=True
)
POLICY = Policy(CONFIG, Compute())
PLAIN = TrainConfig(lr=1e-3, warmup_steps=0, lr_schedule="constant", max_grad_norm=0.0)
BATCH = {"x": np.ones(2, np.float32)}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class Sum(Objective):
    """Its gradient is 1 everywhere, so that each step of Adam is as long as the learning rate."""

    def __call__(self, policy, params, batch, context):
        return sum(jnp.sum(x) for x in jax.tree.leaves(params)) * jnp.mean(batch["x"]), {}


def step_of(settings, objective=None, **more):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return TrainStep(
        POLICY,
        objective or Sum(),
        AdamW.from_config(settings),
        mesh,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        **more,
    )


def program(settings):
    return step_of(settings).lower(BATCH).as_text()


def zeros():
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(CONFIG))


@pytest.mark.parametrize("lr_schedule", ["constant", "linear", "cosine"])
def test_learning_rate_warmup_and_length_are_no_part_of_the_program(lr_schedule):
    one = dataclasses.replace(PLAIN, lr_schedule=lr_schedule)
    two = dataclasses.replace(
        one, lr=0.3, warmup_steps=9, epochs=7.0, checkpoint_every=3, batch_size=2,
        retain_batch_size=4,
    )  # fmt: skip
    assert step_of(one) == step_of(two) and hash(step_of(one)) == hash(step_of(two))
    assert program(one) == program(two)


@pytest.mark.parametrize(
    "change",
    [
        {"lr_schedule": "linear"},
        {"weight_decay": 0.1},
        {"b1": 0.8},
        {"b2": 0.9},
        {"max_grad_norm": 2.0},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_else_is(change):
    changed = dataclasses.replace(PLAIN, **change)
    assert step_of(PLAIN) != step_of(changed)
    assert program(PLAIN) != program(changed)


def rates(step, settings, num_steps):
    """The length of each of the steps that a phase makes."""
    state = step.init(zeros(), schedule=Schedule.from_config(settings, num_steps))
    found, before = [], 0.0
    for _ in range(num_steps):
        state, _ = step(state, step.put(BATCH))
        now = float(state.params["embed"][0, 0])
        found.append(before - now)
        before = now
    return found, state


def test_one_update_learns_at_the_rate_of_each_phase():
    slow_phase = dataclasses.replace(PLAIN, lr=1e-3, lr_schedule="linear")
    fast_phase = dataclasses.replace(slow_phase, lr=0.5, warmup_steps=3)
    with compiled() as names:
        # Linear decay over 2 steps; warm-up of 3, then linear decay over the other 5.
        slow, _ = rates(step_of(slow_phase), slow_phase, 2)
        fast, state = rates(step_of(slow_phase), fast_phase, 8)
        # The other phase's own step ends in the same bits.
        assert_trees_equal(rates(step_of(fast_phase), fast_phase, 8)[1], state)
    np.testing.assert_allclose(slow, [1e-3, 5e-4], rtol=1e-4)
    wanted = 0.5 * np.array([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2])
    # Adam's eps and the rounding of its bias correction, and differences of sums near 2.
    np.testing.assert_allclose(fast, wanted, rtol=1e-4)
    assert names.count("jit(_update)") == 1


def objective_of(name, **groups):
    return find(name).objective(Config(**groups))


def test_phases_that_share_a_step_compile_once():
    first = step_of(PLAIN, objective_of("ga"))
    changed = dataclasses.replace(PLAIN, lr=0.1, epochs=3.0, warmup_steps=5, checkpoint_every=7)
    assert step_of(changed, objective_of("ga")) == first
    # Settings that the objective does not have make no difference either.
    unused = GradientAscentConfig(beta=3.0)
    assert step_of(changed, objective_of("ga", gradient_ascent=unused)) == first
    weighted = FixedTargetConfig(retain_weight=0.5)
    others = [
        step_of(dataclasses.replace(PLAIN, weight_decay=0.1), objective_of("ga")),
        step_of(PLAIN, objective_of("grad_diff")),
        step_of(PLAIN, objective_of("grad_diff", fixed_target=weighted)),
        step_of(PLAIN, objective_of("ga"), ema_decay=0.9),
        step_of(PLAIN, objective_of("kl")),
        step_of(PLAIN, objective_of("pdu")),
        step_of(PLAIN, objective_of("wga")),
        step_of(PLAIN, objective_of("wga", gradient_ascent=unused)),
    ]
    assert len({first, *others}) == 9


def test_a_phase_of_a_shared_update_has_its_own_schedule():
    """The schedule is part of the state; the step is shared."""
    plans = []
    for lr, steps in ((1e-3, 4), (0.2, 50)):
        settings = dataclasses.replace(PLAIN, lr=lr, warmup_steps=9)
        step = step_of(settings, objective_of("ga"))
        plan = step.init(zeros(), schedule=Schedule.from_config(settings, steps)).opt_state.schedule
        plans.append((float(plan.lr), int(plan.warmup_steps), int(plan.num_steps), int(plan.done)))
    assert plans == [(pytest.approx(1e-3), 3, 4, 0), (pytest.approx(0.2), 9, 50, 0)]


def test_a_schedule_is_for_adamw_alone():
    with pytest.raises(ValueError, match="a schedule is for AdamW alone, and AdamW needs one"):
        step_of(PLAIN).init(zeros())
    step = dataclasses.replace(step_of(PLAIN), optimizer=optax.sgd(1.0))
    with pytest.raises(ValueError, match="a schedule is for AdamW alone"):
        step.init(zeros(), schedule=Schedule())
