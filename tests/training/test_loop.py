import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_trees_equal

from cipo_jax import losses
from cipo_jax.config import TrainConfig
from cipo_jax.data.batches import PadShape, TokenizedExample, collate
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params
from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.loop import Callbacks, Diverged, Phase, train_phase
from cipo_jax.training.mesh import make_mesh, param_shardings
from cipo_jax.training.optimizer import AdamW, Schedule
from cipo_jax.training.step import Objective, PhaseResult, Policy, TrainState, TrainStep

CONFIG = DecoderConfig(
    vocab_size=64, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, head_dim=8, tied_head=True
)
STEPS = 7


@dataclasses.dataclass(frozen=True)
class _Objective(Objective):
    """NLL, with two ways to go wrong: a factor on the loss, and a root whose slope can blow up."""

    def __call__(self, policy, params, batch, context):
        logps = policy.completion_logps(params, batch["rows"])
        loss = losses.nll(logps, batch["rows"].mask)[0] * jnp.mean(batch["factor"])
        scale = jnp.sum(params["final_norm"]["scale"])
        root = jnp.sqrt(jnp.mean(batch["inside"]) * jnp.square(scale))
        return loss + 0.0 * root, {"mark": jnp.mean(batch["mark"])}


def _batch_at(step, factor=1.0, inside=1.0):
    rng = np.random.default_rng((3, step))
    rows = [TokenizedExample(rng.integers(0, 64, 3), rng.integers(0, 64, 5)) for _ in range(4)]
    return {
        "rows": collate(rows, PadShape(8, 5)),
        "factor": np.full(4, factor, np.float32),
        "inside": np.full(4, inside, np.float32),
        "mark": np.full(4, step, np.float32),
    }


def _params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), abstract_params(CONFIG)
    )


SETTINGS = TrainConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1)
SCHEDULE = Schedule.from_config(SETTINGS, STEPS)


def _step(mesh, ema_decay=0.9):
    optimizer = AdamW.from_config(SETTINGS)
    return TrainStep(Policy(CONFIG, Compute()), _Objective(), optimizer, mesh, ema_decay=ema_decay)


def _start():
    return PhaseResult(_params(), _params(1))


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def step():
    return _step(make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def _run(step, checkpoints, every=100, batch_at=_batch_at, initial=None, **callbacks):
    phase = Phase("phase", step, SCHEDULE, STEPS, every)
    initial = _start() if initial is None else initial
    return train_phase(phase, initial, batch_at, checkpoints, Callbacks(**callbacks))


@pytest.fixture(scope="module")
def uninterrupted(step, tmp_path_factory):
    return _run(step, Checkpoints(tmp_path_factory.mktemp("whole")))


def _stop_at(step):
    asked = iter(range(1, STEPS + 1))
    return lambda: next(asked) == step


@pytest.mark.parametrize("at", [1, 4, STEPS])
def test_a_phase_stopped_and_resumed_ends_bit_identical(step, uninterrupted, tmp_path, at):
    saves = []
    first = _run(
        step,
        Checkpoints(tmp_path),
        should_stop=_stop_at(at),
        on_save=lambda: saves.append(None),
    )
    assert first is None
    assert len(saves) == 1
    assert Checkpoints(tmp_path).latest_step("phase") == at
    assert_trees_equal(_run(step, Checkpoints(tmp_path)), uninterrupted)


def test_training_moves_parameters_and_average(uninterrupted):
    for name, seed in (("params", 0), ("ema", 1)):
        moved = getattr(uninterrupted, name)["embed"] - _params(seed)["embed"]
        assert float(jnp.abs(moved).max()) > 1e-3


def test_periodic_checkpoints_change_nothing_and_are_announced(step, uninterrupted, tmp_path):
    checkpoints, seen = Checkpoints(tmp_path), []
    end = _run(
        step, checkpoints, every=3, on_save=lambda: seen.append(checkpoints.latest_step("phase"))
    )
    assert_trees_equal(end, uninterrupted)
    assert seen == [3, 6]


def test_a_phase_killed_after_a_checkpoint_resumes_from_it(step, uninterrupted, tmp_path):
    class Killed(Exception):
        pass

    def kill(number, metrics):
        if number == 5:
            raise Killed

    with pytest.raises(Killed):
        _run(step, Checkpoints(tmp_path), every=3, on_step=kill)
    steps = []
    end = _run(
        step, Checkpoints(tmp_path), every=3, on_step=lambda number, metrics: steps.append(number)
    )
    assert steps == [4, 5, 6, 7]
    assert_trees_equal(end, uninterrupted)


def test_on_step_is_called_once_a_step_with_that_steps_metrics(step, tmp_path):
    calls = []

    def on_step(number, metrics):
        calls.append((number, metrics["mark"]))
        assert set(metrics) == {"loss", "grad_norm", "mark"}
        assert all(type(value) is float for value in metrics.values())

    _run(step, Checkpoints(tmp_path), should_stop=_stop_at(3), on_step=on_step)
    # When a stopped phase returns, every step of its checkpoint has been reported.
    assert calls == [(1, 0.0), (2, 1.0), (3, 2.0)]
    _run(step, Checkpoints(tmp_path), on_step=on_step)
    assert calls == [(i + 1, float(i)) for i in range(STEPS)]


def test_a_phase_of_no_steps_returns_its_start(step, tmp_path):
    phase = Phase("none", step, SCHEDULE, 0, 1)
    assert_trees_equal(train_phase(phase, _start(), _batch_at, Checkpoints(tmp_path)), _start())


@pytest.mark.parametrize(
    ("bad", "kept"),
    [
        # A bad step is told one step later, when the next has been computed from it already; on a
        # checkpoint's step (4) and on the last (7) there is no next one to wait for.
        pytest.param(1, None, id="first"),
        pytest.param(4, 2, id="on-a-checkpoint"),
        pytest.param(5, 4, id="after-a-checkpoint"),
        pytest.param(STEPS, 6, id="last"),
    ],
)
def test_a_loss_that_is_not_a_number_names_the_step(step, tmp_path, bad, kept):
    checkpoints, steps = Checkpoints(tmp_path), []

    def batch_at(number):
        return _batch_at(number, factor=math.nan if number + 1 == bad else 1.0)

    with pytest.raises(Diverged) as raised:
        _run(
            step,
            checkpoints,
            every=2,
            batch_at=batch_at,
            on_step=lambda number, metrics: steps.append(number),
        )
    assert f"loss is nan at step {bad};" in str(raised.value)
    assert steps == list(range(1, bad))
    assert checkpoints.latest_step("phase") == kept
    if kept is None:
        assert "checkpoint before this phase is kept" in str(raised.value)
    else:
        assert f"checkpoint of step {kept} is kept" in str(raised.value)
        state = checkpoints.load_step("phase", kept, step.abstract_state())
        assert int(state.step) == kept
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))


def test_a_gradient_that_is_not_a_number_diverges_though_the_loss_is_one(step, tmp_path):
    def batch_at(number):
        return _batch_at(number, inside=0.0 if number == 2 else 1.0)

    with pytest.raises(Diverged, match=r"grad_norm is (nan|inf) at step 3;"):
        _run(step, Checkpoints(tmp_path), batch_at=batch_at)


def test_arrays_of_a_callable_are_given_up_and_others_are_copied(step, uninterrupted, tmp_path):
    kept, given = (
        jax.device_put(_start(), jax.devices()[0]) for _ in range(2)
    )  # fmt: skip
    end = _run(step, Checkpoints(tmp_path / "kept"), initial=kept)
    assert_trees_equal(end, uninterrupted)
    assert_trees_equal(kept, _start())
    end = _run(step, Checkpoints(tmp_path / "given"), initial=lambda: given)
    assert_trees_equal(end, uninterrupted)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))


def test_a_callable_is_not_called_where_there_is_a_checkpoint(step, uninterrupted, tmp_path):
    _run(step, Checkpoints(tmp_path), should_stop=_stop_at(2))
    end = _run(step, Checkpoints(tmp_path), initial=lambda: pytest.fail("it was called"))
    assert_trees_equal(end, uninterrupted)


# Checkpoints by themselves.


def _folders(path):
    return sorted(p.name for p in path.iterdir())


def _state(value):
    return TrainState({"x": jnp.full(3, float(value))}, {}, jnp.int32(value))


def _result(value):
    return PhaseResult({"x": jnp.full(2, float(value))})


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_save_step_keeps_the_latest_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step("a") is None
    for step in (2, 4, 10):
        checkpoints.save_step("a", step, _state(step))
        checkpoints.save_step("b", 1, _state(0))
        assert checkpoints.latest_step("a") == step
        assert len(_folders(tmp_path / "a.steps")) == 1
    loaded = checkpoints.load_step("a", 10, _abstract(_state(0)))
    assert_trees_equal(loaded, _state(10))
    assert checkpoints.latest_step("b") == 1


def test_save_phase_drops_its_own_steps_and_can_be_repeated(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_step("a", 3, _state(0))
    checkpoints.save_step("b", 3, _state(0))
    assert not checkpoints.has_phase("a")
    for value in (1.0, 2.0):
        checkpoints.save_phase("a", _result(value))
    assert checkpoints.has_phase("a")
    assert checkpoints.latest_step("a") is None
    assert checkpoints.latest_step("b") == 3
    assert_trees_equal(checkpoints.load_phase("a", _abstract(_result(0))), _result(2.0))
    checkpoints.drop_phase("a")
    checkpoints.drop_phase("a")
    assert not checkpoints.has_phase("a")


def test_leftovers_of_killed_writes_are_cleaned_and_nothing_else(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_phase("warmup", _result(1))
    checkpoints.save_step("phase", 4, _state(1))
    leftovers = [
        tmp_path / "phase.orbax-checkpoint-tmp",
        tmp_path / "phase.steps" / "00000006.orbax-checkpoint-tmp",
        tmp_path / "phase.steps" / "00000006.orbax-checkpoint-tmp" / "d.orbax-checkpoint-tmp-1",
        tmp_path / "other.steps" / "00000001.orbax-checkpoint-tmp-17",
    ]
    for folder in leftovers:
        folder.mkdir(parents=True)
        (folder / "file").write_text("half")
    # A leftover is not taken for a checkpoint even before it is cleaned.
    assert checkpoints.latest_step("phase") == 4
    again = Checkpoints(tmp_path)
    assert not any(folder.exists() for folder in leftovers)
    assert again.latest_step("phase") == 4
    assert again.latest_step("other") is None
    assert_trees_equal(again.load_step("phase", 4, _abstract(_state(0))), _state(1))
    assert again.has_phase("warmup")


def test_orbax_writes_to_the_name_that_is_cleaned(tmp_path, monkeypatch):
    # The write is broken off right where the finished folder would get its final name.
    atomicity = pytest.importorskip("orbax.checkpoint._src.path.atomicity")

    class Killed(Exception):
        pass

    async def killed(*args, **kwargs):
        raise Killed

    for name in dir(atomicity):
        cls = getattr(atomicity, name)
        if isinstance(cls, type) and "finalize" in vars(cls):
            monkeypatch.setattr(cls, "finalize", killed)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(Exception):  # noqa: B017  (orbax may wrap it)
        checkpoints.save_step("phase", 2, _state(1))
    left = _folders(tmp_path / "phase.steps")
    assert left and all("orbax-checkpoint-tmp" in name for name in left)
    assert checkpoints.latest_step("phase") is None
    assert _folders(Checkpoints(tmp_path).root / "phase.steps") == []


@pytest.mark.parametrize(("source", "target"), [((2, 2, 2), (1, 4, 2)), ((1, 8, 1), (1, 1, 1))])
def test_a_state_loads_onto_another_mesh(tmp_path, source, target):
    checkpoints = Checkpoints(tmp_path)
    state = _step(make_mesh(*source)).init(_params(), ema=_params(1), schedule=SCHEDULE)
    state = state.replace(opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))
    checkpoints.save_step("phase", 5, state)
    devices = jax.devices()[: math.prod(target)]
    abstract = _step(make_mesh(*target, devices=devices)).abstract_state()
    loaded = checkpoints.load_step("phase", 5, abstract)
    assert_trees_equal(loaded, state)
    assert jax.tree.all(
        jax.tree.map(lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim), loaded, abstract)
    )


def test_more_may_be_stored_than_is_asked_for(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    whole = PhaseResult({"x": jnp.ones(2)}, {"x": jnp.zeros(2)}, {"dual": jnp.float32(0.5)})
    checkpoints.save_phase("phase", whole)
    assert_trees_equal(checkpoints.load_phase("phase", _abstract(whole)), whole)
    assert_trees_equal(checkpoints.load_phase("phase", _abstract(_result(0))), _result(1))


def test_phase_parameters_load_onto_another_mesh(tmp_path):
    checkpoints, params = Checkpoints(tmp_path), _params()
    source, target = make_mesh(2, 2, 2), make_mesh(8, 1, 1)
    placed = jax.device_put(params, param_shardings(params, source))
    checkpoints.save_phase("phase", PhaseResult(placed))
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        params,
        param_shardings(params, target),
    )
    loaded = checkpoints.load_phase("phase", PhaseResult(abstract))
    assert_trees_equal(loaded, PhaseResult(params))
    assert loaded.params["embed"].sharding.mesh == target
