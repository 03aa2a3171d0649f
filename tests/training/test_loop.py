import dataclasses
import gc
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from objectives import FunctionObjective, TrainSettings
from trees import assert_trees_equal

from cipo_jax import losses
from cipo_jax.data.batches import PadShape, TokenizedExample, collate
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params
from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.loop import Callbacks, Diverged, Phase, train_phase
from cipo_jax.training.mesh import make_mesh, param_shardings
from cipo_jax.training.objective import Objective
from cipo_jax.training.optimizer import AdamW, Schedule
from cipo_jax.training.policy import Policy
from cipo_jax.training.step import PhaseResult, TrainState, TrainStep

CONFIG = DecoderConfig(
    vocab_size=64, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, head_dim=8, tied_head=True
)
STEPS = 7


def _objective(policy, params, batch):
    """NLL, with two ways to go wrong: a factor on the loss, and a root whose slope can blow up."""
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


SETTINGS = TrainSettings(lr=1e-2, warmup_steps=2, weight_decay=0.1)
SCHEDULE = Schedule.from_config(SETTINGS, STEPS)


def _step(mesh, ema_decay=0.9):
    optimizer, objective = AdamW.from_config(SETTINGS), FunctionObjective(_objective)
    return TrainStep(Policy(CONFIG, Compute()), objective, optimizer, mesh, ema_decay=ema_decay)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def trained():
    return _step(make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def _run(step, checkpoints, every=100, batch_at=_batch_at, **hooks):
    phase = Phase("phase", step, SCHEDULE, STEPS, every)
    initial = PhaseResult(_params(), _params(1))
    return train_phase(phase, initial, batch_at, checkpoints, Callbacks(**hooks))


@pytest.fixture(scope="module")
def uninterrupted(trained, tmp_path_factory):
    return _run(trained, Checkpoints(tmp_path_factory.mktemp("whole")))


def _stop_at(step):
    asked = iter(range(1, STEPS + 1))
    return lambda: next(asked) == step


@pytest.mark.parametrize("step", [1, 4, STEPS])
def test_a_phase_stopped_and_resumed_ends_bit_identical(trained, uninterrupted, tmp_path, step):
    saves = []
    first = _run(
        trained,
        Checkpoints(tmp_path),
        should_stop=_stop_at(step),
        on_save=lambda: saves.append(None),
    )
    assert first is None
    assert len(saves) == 1
    assert Checkpoints(tmp_path).latest_step("phase") == step
    assert_trees_equal(_run(trained, Checkpoints(tmp_path)), uninterrupted)


def test_training_moves_parameters_and_average(uninterrupted):
    for found, seed in ((uninterrupted.params, 0), (uninterrupted.ema, 1)):
        moved = found["embed"] - _params(seed)["embed"]
        assert float(jnp.abs(moved).max()) > 1e-3


def test_periodic_checkpoints_change_nothing_and_are_announced(trained, uninterrupted, tmp_path):
    checkpoints, seen = Checkpoints(tmp_path), []
    end = _run(
        trained, checkpoints, every=3, on_save=lambda: seen.append(checkpoints.latest_step("phase"))
    )
    assert_trees_equal(end, uninterrupted)
    assert seen == [3, 6]


def test_a_phase_killed_after_a_checkpoint_resumes_from_it(trained, uninterrupted, tmp_path):
    class Killed(Exception):
        pass

    def kill(step, metrics):
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        _run(trained, Checkpoints(tmp_path), every=3, on_step=kill)
    steps = []
    end = _run(
        trained, Checkpoints(tmp_path), every=3, on_step=lambda step, metrics: steps.append(step)
    )
    assert steps == [4, 5, 6, 7]
    assert_trees_equal(end, uninterrupted)


def test_on_step_is_called_once_a_step_with_that_steps_metrics(trained, tmp_path):
    calls = []

    def on_step(step, metrics):
        calls.append((step, metrics["mark"]))
        assert set(metrics) == {"loss", "grad_norm", "mark"}
        assert all(type(value) is float for value in metrics.values())

    _run(trained, Checkpoints(tmp_path), should_stop=_stop_at(3), on_step=on_step)
    # When a stopped phase returns, every step of its checkpoint has been reported.
    assert calls == [(1, 0.0), (2, 1.0), (3, 2.0)]
    _run(trained, Checkpoints(tmp_path), on_step=on_step)
    assert calls == [(i + 1, float(i)) for i in range(STEPS)]


def test_a_phase_of_no_steps_returns_its_start(trained, tmp_path):
    initial = PhaseResult(_params(), _params(1))
    phase = Phase("none", trained, SCHEDULE, 0, 1)
    end = train_phase(phase, initial, _batch_at, Checkpoints(tmp_path))
    assert_trees_equal(end, initial)


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
def test_a_loss_that_is_not_a_number_names_the_step(trained, tmp_path, bad, kept):
    checkpoints, steps = Checkpoints(tmp_path), []

    def batch_at(step):
        return _batch_at(step, factor=math.nan if step + 1 == bad else 1.0)

    with pytest.raises(Diverged) as raised:
        _run(
            trained,
            checkpoints,
            every=2,
            batch_at=batch_at,
            on_step=lambda step, metrics: steps.append(step),
        )
    assert f"loss is nan at step {bad};" in str(raised.value)
    assert steps == list(range(1, bad))
    assert checkpoints.latest_step("phase") == kept
    if kept is None:
        assert "checkpoint before this phase is kept" in str(raised.value)
    else:
        assert f"checkpoint of step {kept} is kept" in str(raised.value)
        state = checkpoints.load_step("phase", kept, trained.abstract_state())
        assert int(state.step) == kept
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))


def test_a_gradient_that_is_not_a_number_diverges_though_the_loss_is_one(trained, tmp_path):
    def batch_at(step):
        return _batch_at(step, inside=0.0 if step == 2 else 1.0)

    with pytest.raises(Diverged, match=r"grad_norm is (nan|inf) at step 3;"):
        _run(trained, Checkpoints(tmp_path), batch_at=batch_at)


# What a phase starts from and ends with.


@dataclasses.dataclass(frozen=True)
class Dual(Objective):
    """NLL above a dual variable, which the NLL moves."""

    initial: float = 0.5

    def initial_aux_state(self):
        return {"dual": self.initial}

    def update_aux_state(self, aux_state, metrics):
        return {"dual": aux_state["dual"] + 0.1 * metrics["nll"]}

    def __call__(self, policy, params, batch, context):
        nll = losses.nll(policy.completion_logps(params, batch["rows"]), batch["rows"].mask)[0]
        dual = context.aux_state["dual"]
        return dual * nll, {"nll": nll, "dual": dual}


def _dual_phase(step, checkpoints, initial, name, **hooks):
    phase = Phase(name, step, SCHEDULE, STEPS, 3)
    return train_phase(phase, initial, _batch_at, checkpoints, Callbacks(**hooks))


def test_named_numbers_go_from_step_to_step_from_phase_to_phase_and_through_checkpoints(tmp_path):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    step = TrainStep(Policy(CONFIG, Compute()), Dual(), AdamW.from_config(SETTINGS), mesh)
    checkpoints, seen = Checkpoints(tmp_path), []

    def on_step(number, metrics):
        seen.append((metrics["dual"], metrics["nll"]))

    first = _dual_phase(step, checkpoints, PhaseResult(_params()), "one", on_step=on_step)
    assert seen[0][0] == 0.5
    for (before, nll), (after, _) in itertools.pairwise(seen):
        assert after == pytest.approx(before + 0.1 * nll, rel=1e-6)
    checkpoints.save_phase("one", first)
    loaded = checkpoints.load_phase("one", step.abstract_result())
    assert_trees_equal(loaded, first)
    assert first.ema is None

    seen.clear()
    second = _dual_phase(step, checkpoints, loaded, "two", on_step=on_step)
    assert seen[0][0] == float(first.aux_state["dual"])
    # The same, stopped and resumed.
    stopped = _dual_phase(step, checkpoints, loaded, "again", should_stop=_stop_at(4))
    assert stopped is None
    assert_trees_equal(_dual_phase(step, checkpoints, loaded, "again"), second)


def test_a_moving_average_starts_at_the_parameters_where_the_phase_before_kept_none(trained):
    phase = Phase("phase", trained, SCHEDULE, 0, 1)
    end = train_phase(
        phase, PhaseResult(_params()), _batch_at, Checkpoints("/nowhere", clean=False)
    )
    assert_trees_equal(end.ema, _params())


def _live_copies():
    """Live float32 arrays of more than one element, in copies of the model's parameters."""
    gc.collect()
    buffers = {}
    for x in jax.live_arrays():
        for shard in x.addressable_shards:
            if x.dtype == jnp.float32 and x.size > 1:
                buffers[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    one = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(abstract_params(CONFIG)))
    return sum(buffers.values()) / one


@pytest.mark.parametrize(("ema_decay", "copies"), [(None, 3), (0.9, 4)])
def test_a_phase_holds_parameters_moments_and_average_alone(tmp_path, ema_decay, copies):
    step = _step(make_mesh(1, 1, 1, devices=jax.devices()[:1]), ema_decay)
    before, live = _live_copies(), []

    def initial():
        return PhaseResult(jax.tree.map(jnp.asarray, _params()))

    def on_step(number, metrics):
        live.append(_live_copies() - before)

    phase = Phase("phase", step, SCHEDULE, 3, 100)
    end = train_phase(phase, initial, _batch_at, Checkpoints(tmp_path), Callbacks(on_step=on_step))
    # Metrics and numbers of the schedule are the rest.
    assert live == pytest.approx([copies] * 3, abs=0.01)
    assert _live_copies() - before == pytest.approx(copies - 2, abs=0.01)
    del end


def test_arrays_that_are_given_as_such_are_copied(trained, tmp_path):
    initial = PhaseResult(*jax.device_put((_params(), _params(1))))
    phase = Phase("phase", trained, SCHEDULE, 2, 100)
    train_phase(phase, initial, _batch_at, Checkpoints(tmp_path))
    assert_trees_equal(initial, PhaseResult(_params(), _params(1)))


def test_a_resumed_phase_does_not_ask_for_what_it_started_from(trained, uninterrupted, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    _run(trained, checkpoints, should_stop=_stop_at(3))

    def never():
        raise AssertionError

    phase = Phase("phase", trained, SCHEDULE, STEPS, 100)
    assert_trees_equal(train_phase(phase, never, _batch_at, checkpoints), uninterrupted)


def test_a_resumed_phase_compiles_nothing(trained, uninterrupted, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with compilations("_update") as compiled:
        _run(trained, checkpoints, should_stop=_stop_at(3))
        _run(trained, checkpoints)
    assert compiled.number == 0


# Checkpoints by themselves.


def _state(x):
    return TrainState({"x": x}, {}, None)


def _folders(path):
    return sorted(p.name for p in path.iterdir())


def test_save_step_keeps_the_latest_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step("a") is None
    for step in (2, 4, 10):
        checkpoints.save_step("a", step, _state(jnp.full((3,), float(step))))
        checkpoints.save_step("b", 1, _state(jnp.zeros((3,))))
        assert checkpoints.latest_step("a") == step
        assert len(_folders(tmp_path / "a.steps")) == 1
    loaded = checkpoints.load_step("a", 10, _state(jax.ShapeDtypeStruct((3,), jnp.float32)))
    np.testing.assert_array_equal(loaded.params["x"], 10.0)
    assert checkpoints.latest_step("b") == 1


def test_save_phase_drops_its_own_steps_and_can_be_repeated(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_step("a", 3, _state(jnp.zeros(2)))
    checkpoints.save_step("b", 3, _state(jnp.zeros(2)))
    assert not checkpoints.has_phase("a")
    for value in (1.0, 2.0):
        checkpoints.save_phase("a", PhaseResult({"x": jnp.full(2, value)}))
    assert checkpoints.has_phase("a")
    assert checkpoints.latest_step("a") is None
    assert checkpoints.latest_step("b") == 3
    abstract = PhaseResult({"x": jax.ShapeDtypeStruct((2,), jnp.float32)})
    np.testing.assert_array_equal(checkpoints.load_phase("a", abstract).params["x"], 2.0)
    checkpoints.drop_phase("a")
    checkpoints.drop_phase("a")
    assert not checkpoints.has_phase("a")


def test_leftovers_of_killed_writes_are_cleaned_and_nothing_else(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_phase("warmup", PhaseResult({"x": jnp.ones(2)}))
    checkpoints.save_step("phase", 4, _state(jnp.ones(2)))
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
    abstract = _state(jax.ShapeDtypeStruct((2,), jnp.float32))
    np.testing.assert_array_equal(again.load_step("phase", 4, abstract).params["x"], 1.0)
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
        checkpoints.save_step("phase", 2, _state(jnp.ones(2)))
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
