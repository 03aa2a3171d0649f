"""Phases of other lengths and learning rates are one program, and still learn at their own rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from objectives import FunctionObjective, TrainSettings
from trees import assert_trees_equal

from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params
from cipo_jax.models.lora import Lora
from cipo_jax.training.mesh import make_mesh
from cipo_jax.training.objective import Objective
from cipo_jax.training.optimizer import AdamW, Schedule
from cipo_jax.training.policy import Policy
from cipo_jax.training.step import TrainStep

CONFIG = DecoderConfig(
    vocab_size=16, d_model=8, d_ff=8, layers=1, heads=1, kv_heads=1, head_dim=8, tied_head=True
)
POLICY = Policy(CONFIG, Compute())
PLAIN = TrainSettings(lr=1e-3, warmup_steps=0, lr_schedule="constant", max_grad_norm=0.0)
BATCH = {"x": np.ones(2, np.float32)}

pytestmark = pytest.mark.usefixtures("quick_compilation")


def summed(policy, params, batch):
    """Its gradient is 1 everywhere, so that each step of Adam is as long as the learning rate."""
    return sum(jnp.sum(x) for x in jax.tree.leaves(params)) * jnp.mean(batch["x"]), {}


def step_of(settings, objective=None, **changes):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    objective = objective or FunctionObjective(summed)
    return TrainStep(POLICY, objective, AdamW.from_config(settings), mesh, **changes)


def program(settings, **changes):
    return step_of(settings, **changes).lower(BATCH).as_text()


def zeros():
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(CONFIG))


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_learning_rate_warmup_and_length_are_no_part_of_the_program(decay):
    one = dataclasses.replace(PLAIN, lr_schedule=decay)
    two = dataclasses.replace(one, lr=0.3, warmup_steps=9)
    assert program(one) == program(two)
    assert step_of(one) == step_of(two)
    assert hash(step_of(one)) == hash(step_of(two))


@pytest.mark.parametrize(
    "change",
    [
        {"lr_schedule": "linear"},
        {"weight_decay": 0.1},
        {"b1": 0.8},
        {"b2": 0.9},
        {"max_grad_norm": 2.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_else_of_the_optimizer_is(change):
    changed = dataclasses.replace(PLAIN, **change)
    assert program(PLAIN) != program(changed)
    assert step_of(PLAIN) != step_of(changed)


@pytest.mark.parametrize(
    "change",
    [{"gradient_accumulation_steps": 2}, {"ema_decay": 0.9}],
    ids=lambda change: next(iter(change)),
)
def test_everything_else_of_the_step_is(change):
    assert program(PLAIN) != program(PLAIN, **change)
    assert step_of(PLAIN) != step_of(PLAIN, **change)


def rates(step, schedule, steps):
    """The length of each step of a phase."""
    state, found, before = step.init(zeros(), schedule=schedule), [], 0.0
    for _ in range(steps):
        state, _ = step(state, step.put(BATCH))
        now = float(state.params["embed"][0, 0])
        found.append(before - now)
        before = now
    return found, state


def test_one_update_learns_at_the_rate_of_each_phase():
    short = dataclasses.replace(PLAIN, lr=1e-3, lr_schedule="linear", b1=0.85)
    long = dataclasses.replace(short, lr=0.5, warmup_steps=3)
    with compilations("_update") as compiled, compilations("_make_state") as made:
        # Linear decay over 2 steps; warm-up of 3, then linear decay over the other 5.
        slow, _ = rates(step_of(short), Schedule.from_config(short, 2), 2)
        fast, state = rates(step_of(long), Schedule.from_config(long, 8), 8)
    np.testing.assert_allclose(slow, [1e-3, 5e-4], rtol=1e-4)
    wanted = 0.5 * np.array([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2])
    # Adam's eps and the rounding of its bias correction, and differences of sums near 2.
    np.testing.assert_allclose(fast, wanted, rtol=1e-4)
    # Making a state is a program as well.
    assert (compiled.number, made.number) == (1, 1)
    # A program of its own ends in the same bits.
    jax.clear_caches()
    with compilations("_update") as compiled:
        assert_trees_equal(rates(step_of(long), Schedule.from_config(long, 8), 8)[1], state)
    assert compiled.number == 1


@dataclasses.dataclass(frozen=True)
class Scaled(Objective):
    """A loss with a setting, a reference and a number that goes from step to step."""

    scale: float = 1.0

    @property
    def needs_reference_params(self):
        return True

    def initial_aux_state(self):
        return {"seen": 0.0}

    def update_aux_state(self, aux_state, metrics):
        return {"seen": aux_state["seen"] + 1.0}

    def __call__(self, policy, params, batch, context):
        difference = jax.tree.map(lambda a, b: jnp.sum(a - b), params, context.reference)
        loss = self.scale * sum(jax.tree.leaves(difference)) * jnp.mean(batch["x"])
        return loss, {"seen": context.aux_state["seen"]}


def test_objectives_that_are_equal_share_a_program_and_others_do_not():
    frozen = jax.device_put(zeros())
    with compilations("_update") as compiled:
        for scale in (2.0, 2.0, 3.0):
            step = step_of(PLAIN, Scaled(scale))
            state = step.init(zeros(), schedule=Schedule(lr=1e-3))
            for i in range(2):
                state, metrics = step(state, step.put(BATCH), frozen)
                assert float(metrics["seen"]) == i
    assert compiled.number == 2


def test_keys_frozen_parameters_and_named_numbers_are_no_part_of_the_program():
    lora = Lora(2, 4.0, dropout=0.3)
    step = step_of(PLAIN, Scaled(), trainable=lora)
    adapters = jax.tree.map(lambda x: np.ones(x.shape, np.float32), step.abstract_trainable())

    @dataclasses.dataclass(frozen=True)
    class Sum(Objective):
        def __call__(self, policy, params, batch, context):
            assert policy.dropout_key is not None
            assert policy.compute.lora_dropout == 0.3
            hidden = policy.completion_states(params, batch["rows"])
            return jnp.mean(jnp.square(hidden - 1.0)), {}

    from cipo_jax.data.batches import PadShape, TokenizedExample, collate

    batch = {"rows": collate([TokenizedExample([1], [2, 3]), TokenizedExample([4], [5])],
                             PadShape(4, 2))}  # fmt: skip
    found = []
    rng = np.random.default_rng(0)
    frozen = jax.device_put(jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), zeros()))
    with compilations("_update") as compiled:
        for seed in (0, 1, 0):
            step = step_of(PLAIN, Sum(), trainable=lora)
            state = step.init(adapters, schedule=Schedule(lr=1e-3))
            state, metrics = step(state, step.put(batch), frozen, jax.random.key(seed))
            found.append(float(metrics["loss"]))
    assert compiled.number == 1
    assert found[0] == found[2] != found[1]


def test_what_a_step_needs_and_lacks_is_an_error():
    plain = step_of(PLAIN)
    state = plain.init(zeros(), schedule=Schedule(lr=1e-3))
    for step, wanted in (
        (step_of(PLAIN, Scaled()), "frozen"),
        (step_of(PLAIN, trainable=Lora(2, 4.0)), "frozen"),
    ):
        with pytest.raises(ValueError, match=wanted):
            step(state, BATCH)
    with pytest.raises(ValueError, match="key"):
        step_of(PLAIN, trainable=Lora(2, 4.0, dropout=0.1))(state, BATCH, zeros())
    with pytest.raises(ValueError, match="schedule"):
        plain.init(zeros())
    with pytest.raises(ValueError, match="aux_state"):
        plain.init(zeros(), schedule=Schedule(lr=1e-3), aux_state={"seen": 1.0})
