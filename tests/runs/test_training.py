"""A phase of training inside of a stage: its memory, its metrics, and how it goes on."""

import dataclasses
import gc
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_run import open_run
from trees import assert_trees_equal

from cipo_jax.config import Config, TrainConfig
from cipo_jax.data.batches import PadShape, TokenizedExample, collate
from cipo_jax.errors import Preempted
from cipo_jax.files import read_jsonl
from cipo_jax.language_model import LanguageModel
from cipo_jax.methods.cipo.objective import WarmupObjective
from cipo_jax.methods.objective import ConstrainedObjective, ForgetLoss
from cipo_jax.methods.retain import KlRetain, completion_nll
from cipo_jax.models.lora import Lora
from cipo_jax.runs.context import Run
from cipo_jax.runs.training import Batches, num_steps, optimize
from cipo_jax.runs.weights import Weights
from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.loop import Diverged
from cipo_jax.training.mesh import make_mesh
from cipo_jax.training.step import TrainStep

STEPS = 4
SETTINGS = TrainConfig(lr=1e-3, warmup_steps=1, checkpoint_every=2)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _batch(step):
    rng = np.random.default_rng(step)
    rows = [TokenizedExample(rng.integers(0, 64, 3), rng.integers(0, 64, 5)) for _ in range(4)]
    return {"chosen": collate(rows, PadShape(8, 5))}


@pytest.fixture(scope="module")
def model():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return LanguageModel.from_pretrained("asset:tiny_lrm/target", mesh)


@pytest.fixture
def open_training(tmp_path, model):
    """Opens the run folder as a process of its own would."""

    def open_(trainable=None, name="run"):
        workspace = SimpleNamespace(model=model.with_trainable(trainable))
        config = dataclasses.replace(Config(), train=SETTINGS)
        return open_run(tmp_path / name, config, workspace=workspace)

    return open_


@dataclasses.dataclass(frozen=True)
class _Imitate(ForgetLoss):
    def __call__(self, policy, params, batch, context):
        return completion_nll(policy, params, batch["chosen"]), {}


@dataclasses.dataclass(frozen=True)
class _KlToBase(KlRetain):
    """On the very rows that are imitated."""

    def __call__(self, policy, params, batch, context):
        return super().__call__(policy, params, {"retain": batch["chosen"]}, context)


# Of all that a state can hold: a moving average, a named number, and a reference beside it.
EVERYTHING = {"objective": ConstrainedObjective(_Imitate(), _KlToBase()), "ema_decay": 0.5}


def _trained(
    run, objective=None, batch_at=_batch, settings=SETTINGS, ema_decay=None, name="warmup"
):
    def train(run: Run, start: Weights) -> Weights:
        batches = Batches(batch_at, STEPS)
        chosen = objective or WarmupObjective()
        return optimize(run, name, "training", start, chosen, settings, batches, ema_decay)

    try:
        return run.stage(name, train, run.base)
    finally:
        run.metrics.close()


class Dies(Exception):
    """In place of a process that is killed."""


# ---- memory


def _buffers():
    """Bytes by buffer of the arrays in memory; shards are arrays too, of the same buffers."""
    shards = (s.data for x in jax.live_arrays() for s in x.addressable_shards)
    return {x.unsafe_buffer_pointer(): x.nbytes for x in shards}


@pytest.fixture
def weighed(monkeypatch):
    """Memory before and after each update step, above what there was, in parameter trees."""
    gc.collect()
    others = jax.live_arrays()  # Kept, so that their buffers stay theirs.
    before, call, found = _buffers(), TrainStep.__call__, []

    def weigh(params):
        found.append(sum(n for at, n in _buffers().items() if at not in before) / params)

    def measured(self, state, *args):
        params = sum(x.nbytes for x in jax.tree.leaves(state.params))
        weigh(params)
        new = call(self, state, *args)
        weigh(params)
        return new

    monkeypatch.setattr(TrainStep, "__call__", measured)
    yield found
    del others


SLACK = 0.05  # Batches, metrics and counts, as a share of the parameters.


def test_three_copies_of_the_parameters_live_within_a_step(open_training, weighed):
    """Parameters and Adam's two moments; what the phase started from is given up."""
    run = open_training()
    run.params(run.base)  # As after an evaluation of what it starts from.
    _trained(run)
    assert len(weighed) == 2 * STEPS
    assert min(weighed) >= 3.0 and max(weighed) <= 3.0 + SLACK


def test_three_copies_live_in_a_phase_that_goes_on_from_another(open_training, weighed):
    run = open_training()

    def both(run: Run, start: Weights) -> Weights:
        first = _phase(run, "one", start)
        run.params(first)
        return _phase(run, "two", first)

    run.stage("both", both, run.base)
    run.metrics.close()
    assert len(weighed) == 4 * STEPS
    assert max(weighed) <= 3.0 + SLACK


def _phase(run, name, start):
    return optimize(run, name, name, start, WarmupObjective(), SETTINGS, Batches(_batch, STEPS))


def test_three_copies_live_in_a_phase_that_goes_on_from_a_checkpoint(open_training, weighed):
    with pytest.raises(Dies):
        _trained(open_training(), batch_at=_dies_at(3))
    weighed.clear()
    _trained(open_training())
    assert len(weighed) == 2 * (STEPS - 2)
    assert max(weighed) <= 3.0 + SLACK


def test_a_moving_average_and_a_reference_are_a_copy_each(open_training, weighed):
    _trained(open_training(), **EVERYTHING)
    assert max(weighed) <= 5.0 + SLACK


# ---- what a phase leaves behind


def _dies_at(step):
    def batch_at(number):
        if number == step:
            raise Dies
        return _batch(number)

    return batch_at


def _arrays(run, weights):
    return jax.tree.map(np.asarray, run.load(weights))


@pytest.mark.parametrize("kind", ["plain", "adapters", "everything"])
def test_a_phase_that_was_killed_ends_in_the_same_bits(open_training, kind):
    trainable = Lora(rank=2, alpha=4.0, dropout=0.1) if kind == "adapters" else None
    how = EVERYTHING if kind == "everything" else {}
    whole = open_training(trainable, "whole")
    expected = _trained(whole, **how)
    with pytest.raises(Dies):
        _trained(open_training(trainable), batch_at=_dies_at(3), **how)
    steps = []
    resumed = open_training(trainable)
    found = _trained(resumed, batch_at=lambda n: steps.append(n) or _batch(n), **how)
    assert steps[1:] == [2, 3]  # After a look at the first batch.
    assert found == expected
    assert found.steps == STEPS
    assert found.keeps_ema == (kind == "everything")
    assert found.aux_names == (("dual",) if kind == "everything" else ())
    one, two = _arrays(whole, expected), _arrays(resumed, found)
    assert_trees_equal(two, one)
    assert (one.ema is not None) == (kind == "everything")
    logs = [read_jsonl(run.folder / "metrics.jsonl") for run in (whole, resumed)]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == list(range(1, STEPS + 1))


def test_a_phase_that_was_killed_after_its_checkpoint_is_not_trained_again(
    open_training, monkeypatch
):
    save_phase = Checkpoints.save_phase

    def dies_after(self, name, result):
        save_phase(self, name, result)
        raise Dies

    monkeypatch.setattr(Checkpoints, "save_phase", dies_after)
    with pytest.raises(Dies):
        _trained(open_training())
    monkeypatch.setattr(Checkpoints, "save_phase", save_phase)

    def no_batch(step):
        raise AssertionError("trained again")

    run = open_training()
    assert "warmup" not in run.ledger
    weights = _trained(run, batch_at=no_batch)
    assert weights.name == "warmup" and weights.steps == STEPS
    assert "warmup" in run.ledger


def test_weights_are_what_their_stage_was_made_from(open_training):
    run = open_training()
    weights = _trained(run)
    assert weights == Weights("warmup", weights.fingerprint, STEPS)
    saved = run.ledger.result("warmup")
    assert saved == weights.to_row()

    def train(run: Run, start: Weights) -> Weights:
        raise AssertionError("trained again")

    assert open_training().stage("warmup", train, run.base) == weights


def test_a_phase_that_is_asked_to_stop_saves_its_step(open_training):
    run = open_training()

    def batch_at(step):
        if step == 2:
            run.preemption._signals.append(15)
        return _batch(step)

    with pytest.raises(Preempted, match="in stage warmup; run the same command again"):
        _trained(run, batch_at=batch_at, settings=dataclasses.replace(SETTINGS, checkpoint_every=9))
    assert run.checkpoints.latest_step("warmup") == 3
    assert "warmup" not in run.ledger


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(open_training, monkeypatch):
    call, taken = TrainStep.__call__, []

    def poisoned(self, state, *args):
        state, metrics = call(self, state, *args)
        taken.append(metrics)
        return state, metrics | {"loss": np.float32("nan")} if len(taken) == 4 else metrics

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    run = open_training()
    with pytest.raises(Diverged, match="warmup: loss is nan at step 4; the checkpoint of step 2"):
        _trained(run)
    assert run.checkpoints.latest_step("warmup") == 2
    assert [row["step"] for row in read_jsonl(run.folder / "metrics.jsonl")] == [1, 2, 3]


# ---- numbers of a phase


@pytest.mark.parametrize(
    ("epochs", "rows", "size", "steps"),
    [(1.0, 16, 8, 2), (1.0, 17, 8, 3), (0.5, 16, 8, 1), (0.01, 16, 8, 1), (0.0, 16, 8, 0)],
)
def test_steps_of_a_phase(epochs, rows, size, steps):
    assert num_steps(TrainConfig(epochs=epochs, batch_size=size), rows) == steps
