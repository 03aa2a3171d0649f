import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from objectives import TrainSettings
from trees import assert_trees_close

from cipo_jax.models.decoder import abstract_params
from cipo_jax.training.optimizer import AdamW, Schedule, learning_rate


def _values(settings: TrainSettings, steps: int) -> np.ndarray:
    schedule = Schedule.from_config(settings, steps)
    lrs = [learning_rate(schedule._replace(done=i), settings.lr_schedule) for i in range(steps + 1)]
    return np.array([float(lr) for lr in lrs])


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_warmup_rises_evenly_from_above_zero_to_the_peak(decay):
    lrs = _values(TrainSettings(lr=1.0, warmup_steps=4, lr_schedule=decay), steps=12)
    # Rounding of f32 alone.
    np.testing.assert_allclose(lrs[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert lrs.max() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("decay", "fraction"),
    [
        ("constant", lambda t: np.ones_like(t)),
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: 0.5 * (1 + np.cos(np.pi * t))),
    ],
)
@pytest.mark.parametrize("warmup", [0, 3])
def test_decay_spans_the_steps_after_warmup(decay, fraction, warmup):
    steps = 11
    lrs = _values(TrainSettings(lr=3e-4, warmup_steps=warmup, lr_schedule=decay), steps)
    t = np.arange(steps - warmup + 1) / (steps - warmup)
    np.testing.assert_allclose(lrs[warmup:], 3e-4 * fraction(t), rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_every_step_of_a_phase_shorter_than_its_warmup_moves(decay, steps):
    lrs = _values(TrainSettings(lr=0.1, warmup_steps=50, lr_schedule=decay), steps)[:steps]
    assert (lrs > 0).all()
    assert lrs[-1] == pytest.approx(0.1, rel=1e-6)


def _params(config, **changes):
    shapes = abstract_params(dataclasses.replace(config, **changes))
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def _apply(settings, params, gradients):
    optimizer, schedule = AdamW.from_config(settings), Schedule.from_config(settings, 10)

    @jax.jit
    def apply(params, gradients):
        updates, _ = optimizer.update(gradients, optimizer.init(params, schedule), params)
        return optax.apply_updates(params, updates)

    return apply(params, gradients)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"tied_head": True}, id="tied"),
        pytest.param({"tied_head": False, "qk_norm": "head"}, id="untied-qk_norm"),
        pytest.param({"qkv_bias": True}, id="qkv_bias"),
    ],
)
def test_weight_decay_shrinks_matrices_and_leaves_scales_and_biases(dummy_config, changes):
    params = _params(dummy_config, **changes)
    config = TrainSettings(lr=0.1, warmup_steps=0, lr_schedule="constant", weight_decay=0.5)
    # Without a gradient, what moves is moved by weight decay alone: p -> p (1 - lr decay).
    moved = _apply(config, params, jax.tree.map(jnp.zeros_like, params))
    seen = set()
    for path, before in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = [key.key for key in path]
        after = moved
        for name in names:
            after = after[name]
        vector = names[-1] in ("scale", "bias")
        factor = 1.0 if vector else 0.95
        np.testing.assert_allclose(after, factor * before, rtol=1e-6, err_msg="/".join(names))
        seen.add(names[-1])
    assert {"embed", "kernel", "scale"} <= seen


def test_clip_bounds_the_gradient_that_adam_sees():
    # One step of Adam divides a gradient by its own size, which hides clipping; so look at the
    # first moment, which is (1 - b1) times the gradient that came in.
    params = {"embed": jnp.ones((16, 8)), "final_norm": {"scale": jnp.ones(8)}}
    gradients = jax.tree.map(jnp.ones_like, params)
    norm = float(optax.global_norm(gradients))

    def moment_norm(max_norm: float) -> float:
        optimizer = AdamW.from_config(TrainSettings(max_grad_norm=max_norm, b1=0.9))
        _, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
        return float(optax.global_norm(optax.tree.get(state, "mu"))) / 0.1

    # f32 sums, and b1 = 0.9 rounded to f32.
    assert moment_norm(0.5) == pytest.approx(0.5, rel=1e-4)
    assert moment_norm(2 * norm) == pytest.approx(norm, rel=1e-4)
    assert moment_norm(0.0) == pytest.approx(norm, rel=1e-4)


def test_the_optimizer_follows_the_schedule():
    params = {"embed": jnp.zeros((4, 4))}
    config = TrainSettings(lr=0.1, warmup_steps=2, lr_schedule="linear", max_grad_norm=0.0)
    optimizer, schedule = AdamW.from_config(config), Schedule.from_config(config, 6)
    state, lrs = optimizer.init(params, schedule), _values(config, 6)
    for step in range(6):
        # A gradient that never changes gives Adam updates of exactly the learning rate, but for
        # its eps of 1e-8 and the rounding of its bias correction.
        updates, state = optimizer.update({"embed": jnp.ones((4, 4))}, state, params)
        np.testing.assert_allclose(-updates["embed"], lrs[step], rtol=1e-4)


def test_betas_reach_adam():
    gradient = {"embed": jnp.full((2, 2), 2.0)}
    config = TrainSettings(b1=0.7, b2=0.6, max_grad_norm=0.0)
    optimizer = AdamW.from_config(config)
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["embed"], 0.3 * 2.0, rtol=1e-6)
    np.testing.assert_allclose(optax.tree.get(state, "nu")["embed"], 0.4 * 4.0, rtol=1e-6)


def test_equal_settings_are_equal_optimizers_whatever_their_schedules():
    one, other = TrainSettings(lr=1e-3, warmup_steps=3), TrainSettings(lr=0.1, warmup_steps=9)
    assert AdamW.from_config(one) == AdamW.from_config(other)
    assert hash(AdamW.from_config(one)) == hash(AdamW.from_config(other))
    assert AdamW.from_config(one) != AdamW.from_config(TrainSettings(b1=0.8))
    # A warm-up longer than the phase is cut.
    assert Schedule.from_config(other, 4) == Schedule(0, 0.1, 3, 4)


def test_the_optimizer_is_that_of_optax():
    settings = TrainSettings(lr=0.1, warmup_steps=0, lr_schedule="constant", weight_decay=0.3,
                             b1=0.8, b2=0.95, max_grad_norm=0.5)  # fmt: skip
    rng = np.random.default_rng(0)
    params = {"embed": rng.normal(size=(4, 3)).astype(np.float32), "scale": np.ones(3, np.float32)}
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(0.1, b1=0.8, b2=0.95, weight_decay=0.3, mask={"embed": True, "scale": False}),
    )
    ours, schedule = AdamW.from_config(settings), Schedule.from_config(settings, 3)
    state, their_state, found, wanted = (
        ours.init(params, schedule),
        theirs.init(params),
        params,
        params,
    )
    for _ in range(3):
        gradients = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        updates, state = ours.update(gradients, state, found)
        found = optax.apply_updates(found, updates)
        updates, their_state = theirs.update(gradients, their_state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    # Clipping and the learning rate round in another order.
    assert_trees_close(found, wanted, atol=1e-6)
