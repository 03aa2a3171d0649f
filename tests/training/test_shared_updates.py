"""Phases of other lengths and learning rates are one program, and still learn at their own rate."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_trees_equal

from cipo_jax.config import BaselineConfig, Config, TrainConfig
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params
from cipo_jax.training.mesh import make_mesh
from cipo_jax.training.optimizer import make_optimizer
from cipo_jax.training.scoring import Scorer
from cipo_jax.training.step import Policy, Trainer
from cipo_jax.unlearning import methods
from cipo_jax.unlearning.run import Run

CONFIG = DecoderConfig(
    vocab_size=16, d_model=8, d_ff=8, layers=1, heads=1, kv_heads=1, head_dim=8, tied_head=True
)
POLICY = Policy(CONFIG, Compute())
PLAIN = TrainConfig(lr=1e-3, warmup_steps=0, decay="constant", clip=0.0)
BATCH = {"x": np.ones(2, np.float32)}

pytestmark = pytest.mark.usefixtures("quick_compilation")


def objective(policy, params, batch):
    """Its gradient is 1 everywhere, so that each step of Adam is as long as the learning rate."""
    return sum(jnp.sum(x) for x in jax.tree.leaves(params)) * jnp.mean(batch["x"]), {}


def trainer_of(settings, steps):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    optimizer = make_optimizer(settings, steps)
    return Trainer(POLICY, objective, optimizer, mesh, settings.accumulation)


def program(settings, steps):
    trainer = trainer_of(settings, steps)
    return trainer.make_update().lower(trainer.abstract_state(), {}, BATCH).as_text()


def zeros():
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(CONFIG))


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_learning_rate_warmup_and_length_are_no_part_of_the_program(decay):
    one = dataclasses.replace(PLAIN, decay=decay)
    two = dataclasses.replace(
        one, lr=0.3, warmup_steps=9, epochs=7.0, checkpoint_every=3, batch=2, retain_batch=4
    )
    assert program(one, 10) == program(two, 123)


@pytest.mark.parametrize(
    "change",
    [
        {"decay": "linear"},
        {"weight_decay": 0.1},
        {"b1": 0.8},
        {"b2": 0.9},
        {"clip": 2.0},
        {"accumulation": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_else_is(change):
    assert program(PLAIN, 10) != program(dataclasses.replace(PLAIN, **change), 10)


def rates(update, trainer, steps):
    """The length of each step that an update makes of a trainer's state."""
    state, found, before = trainer.init(zeros()), [], 0.0
    for _ in range(steps):
        state, _ = update(state, {}, trainer.put(BATCH))
        now = float(state["params"]["embed"][0, 0])
        found.append(before - now)
        before = now
    return found, state


def test_one_update_learns_at_the_rate_of_each_phase():
    short = trainer_of(dataclasses.replace(PLAIN, lr=1e-3, decay="linear"), 2)
    long = trainer_of(dataclasses.replace(PLAIN, lr=0.5, decay="linear", warmup_steps=3), 8)
    update = short.make_update()
    # Linear decay over 2 steps; warm-up of 3, then linear decay over the other 5.
    slow, _ = rates(update, short, 2)
    np.testing.assert_allclose(slow, [1e-3, 5e-4], rtol=1e-4)
    fast, state = rates(update, long, 8)
    wanted = 0.5 * np.array([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2])
    # Adam's eps and the rounding of its bias correction, and differences of sums near 2.
    np.testing.assert_allclose(fast, wanted, rtol=1e-4)
    assert update._cache_size() == 1
    # The other phase's own update ends in the same bits.
    assert_trees_equal(rates(long.make_update(), long, 8)[1], state)


def run_of(**changes):
    """As much of an engine as a run needs to make its updates."""
    config = Config(baseline=BaselineConfig(**changes))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return Run(
        SimpleNamespace(
            config=config,
            mesh=mesh,
            part=None,
            scorer=Scorer(POLICY, mesh),
            updates={},
            trainers={},
        )
    )


def update_of(run, settings, steps, name="ga", **more):
    made = methods.objective_of(name, run.engine.config.baseline)
    carried = methods.carried_of(name, run.engine.config.baseline)
    return run.trainer(settings, made, steps, carried=carried, **more)[1]


def test_a_run_makes_the_update_once_for_all_phases_that_share_it():
    run = run_of()
    first = update_of(run, PLAIN, 10)
    assert update_of(run, PLAIN, 10) is first
    changed = dataclasses.replace(PLAIN, lr=0.1, epochs=3.0, warmup_steps=5, checkpoint_every=7)
    assert update_of(run, changed, 99) is first
    assert len(run.engine.updates) == 1
    others = [
        update_of(run, dataclasses.replace(PLAIN, weight_decay=0.1), 10),
        update_of(run, PLAIN, 10, "grad_diff"),
        update_of(run, PLAIN, 10, ema=True),
        update_of(run, PLAIN, 10, "kl", refers=True),
        update_of(run, PLAIN, 10, "pdu"),
    ]
    assert len({id(update) for update in (first, *others)}) == 6


def test_a_phase_of_a_shared_update_has_its_own_schedule():
    """The trainer makes the state, which the schedule is part of; the update is another's."""
    run = run_of()
    ga = methods.objective_of("ga", run.engine.config.baseline)
    plans = []
    for lr, steps in ((1e-3, 4), (0.2, 50)):
        settings = dataclasses.replace(PLAIN, lr=lr, warmup_steps=9)
        trainer, _ = run.trainer(settings, ga, steps)
        (plan,) = (s for s in trainer.init(zeros())["opt_state"] if hasattr(s, "warmup"))
        plans.append((float(plan.lr), int(plan.warmup), int(plan.steps), int(plan.done)))
    assert plans == [(pytest.approx(1e-3), 3, 4, 0), (pytest.approx(0.2), 9, 50, 0)]
