import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import cipo_jax
from cipo_jax.losses import dpo, ipo, sequence_logps, simpo

# Everything here runs in float64, so that only the order of a few operations is left to differ.
TOLERANCE = 1e-12
METRICS = {
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected",
}  # fmt: skip


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def pairs(seed=0, batch=6):
    """Log-probabilities (policy chosen and rejected, reference chosen and rejected), lengths."""
    rng = np.random.default_rng(seed)
    logps = -rng.uniform(1, 30, size=(4, batch))
    lengths = rng.integers(3, 20, size=(2, batch))
    return logps, lengths


def check_metrics(metrics, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps):
    assert set(metrics) == METRICS
    wanted = {
        "rewards/chosen": np.mean(chosen_rewards),
        "rewards/rejected": np.mean(rejected_rewards),
        "rewards/accuracies": np.mean(chosen_rewards > rejected_rewards),
        "rewards/margins": np.mean(chosen_rewards - rejected_rewards),
        "logps/chosen": np.mean(chosen_logps),
        "logps/rejected": np.mean(rejected_logps),
    }
    assert 0 < wanted["rewards/accuracies"] < 1
    for name, value in wanted.items():
        assert jnp.shape(metrics[name]) == ()
        # Accuracies are float32 whatever the log-probabilities are.
        tolerance = 1e-7 if name == "rewards/accuracies" else TOLERANCE
        np.testing.assert_allclose(metrics[name], value, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_dpo_equals_its_formula(beta, label_smoothing):
    (y_w, y_l, ref_w, ref_l), _ = pairs()
    loss, metrics = dpo(y_w, y_l, ref_w, ref_l, beta=beta, label_smoothing=label_smoothing)
    margins = beta * ((y_w - ref_w) - (y_l - ref_l))
    losses = -(1 - label_smoothing) * log_sigmoid(margins) - label_smoothing * log_sigmoid(-margins)
    np.testing.assert_allclose(loss, losses.mean(), rtol=TOLERANCE)
    check_metrics(metrics, beta * (y_w - ref_w), beta * (y_l - ref_l), y_w, y_l)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_dpo_of_equal_policies_is_ln_2(label_smoothing):
    (y_w, y_l, _, _), _ = pairs()
    loss, metrics = dpo(y_w, y_l, y_w, y_l, beta=0.3, label_smoothing=label_smoothing)
    np.testing.assert_allclose(loss, np.log(2), rtol=TOLERANCE)
    assert metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0


def test_label_smoothing_puts_the_minimum_at_its_log_odds():
    (_, y_l, ref_w, ref_l), _ = pairs()
    e, beta = 0.2, 0.5
    best = np.log((1 - e) / e) / beta

    def loss(shift):
        # Every pair has the same margin, `shift` before beta.
        return dpo(y_l + ref_w - ref_l + shift, y_l, ref_w, ref_l, beta=beta, label_smoothing=e)[0]

    assert abs(jax.grad(loss)(best)) < TOLERANCE
    assert jax.grad(loss)(best - 1) < -0.01
    assert jax.grad(loss)(best + 1) > 0.01


def test_ipo_equals_its_formula():
    (y_w, y_l, ref_w, ref_l), (len_w, len_l) = pairs()
    loss, metrics = ipo(y_w, y_l, ref_w, ref_l, len_w, len_l, beta=0.2)
    chosen, rejected = (y_w - ref_w) / len_w, (y_l - ref_l) / len_l
    np.testing.assert_allclose(loss, np.mean((chosen - rejected - 2.5) ** 2), rtol=TOLERANCE)
    check_metrics(metrics, 0.2 * chosen, 0.2 * rejected, y_w, y_l)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_simpo_equals_its_formula(label_smoothing):
    (y_w, y_l, _, _), (len_w, len_l) = pairs()
    loss, metrics = simpo(
        y_w, y_l, len_w, len_l, beta=2.5, gamma=0.8, label_smoothing=label_smoothing
    )
    chosen, rejected = 2.5 * y_w / len_w, 2.5 * y_l / len_l
    margins = chosen - rejected - 0.8
    losses = -(1 - label_smoothing) * log_sigmoid(margins) - label_smoothing * log_sigmoid(-margins)
    np.testing.assert_allclose(loss, losses.mean(), rtol=TOLERANCE)
    # The target margin is part of the loss, not of the rewards.
    check_metrics(metrics, chosen, rejected, y_w, y_l)


def losses_of(ref, lengths):
    return {
        "dpo": lambda y_w, y_l: dpo(y_w, y_l, *ref, beta=0.3, label_smoothing=0.1)[0],
        "ipo": lambda y_w, y_l: ipo(y_w, y_l, *ref, *lengths, beta=0.3)[0],
        "simpo": lambda y_w, y_l: simpo(y_w, y_l, *lengths, label_smoothing=0.1)[0],
    }


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo"])
def test_gradients_equal_finite_differences(name):
    (y_w, y_l, *ref), lengths = pairs()
    # Central differences of 1e-5 in float64 are good to 1e-9 or so.
    check_grads(
        losses_of(ref, lengths)[name], (y_w, y_l), order=1, modes=["rev"], atol=1e-7, rtol=1e-7,
        eps=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo"])
def test_a_step_down_raises_the_chosen_and_lowers_the_rejected(name):
    (_, _, *ref), lengths = pairs()
    function = losses_of(ref, lengths)[name]
    # From the reference itself, where no pair is settled yet.
    up, down = jax.grad(function, (0, 1))(*(np.array(x) for x in ref))
    assert (up < 0).all()
    assert (down > 0).all()


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_the_reference_gets_no_gradient(name):
    logps, lengths = pairs()

    def loss(y_w, y_l, ref_w, ref_l):
        return losses_of((ref_w, ref_l), lengths)[name](y_w, y_l)

    policy_w, policy_l, ref_w, ref_l = jax.grad(loss, (0, 1, 2, 3))(*logps)
    assert np.abs(policy_w).min() > 0
    assert np.abs(policy_l).min() > 0
    assert not np.any(ref_w)
    assert not np.any(ref_l)


@pytest.mark.parametrize("margin", [-1e5, 1e5])
def test_far_apart_pairs_stay_finite_in_float32(margin):
    y_w, y_l = np.array([margin], np.float32), np.zeros(1, np.float32)
    for loss in (
        lambda y_w: dpo(y_w, y_l, y_l, y_l, beta=1.0)[0],
        lambda y_w: simpo(y_w, y_l, 1, 1, beta=1.0)[0],
    ):
        value, grad = jax.value_and_grad(loss)(y_w)
        assert value.dtype == jnp.float32
        assert abs(float(value) - max(-margin, 0)) < 1
        assert float(grad[0]) == (-1.0 if margin < 0 else 0.0)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo"])
def test_padding_has_no_influence_on_values_and_gradients(name):
    _, lengths = pairs()
    longest = int(lengths.max())
    rng = np.random.default_rng(1)
    tokens = -rng.uniform(0, 2, size=(4, 6, longest))

    def value_and_grad(slots, filler):
        """With `slots` slots a completion, of which those past its length hold `filler`."""
        masks = np.arange(slots) < np.array([*lengths, *lengths])[..., None]
        padded = np.full((4, 6, slots), filler)
        padded[..., :longest] = tokens
        padded = np.where(masks, padded, filler)

        def loss(padded):
            y_w, y_l, ref_w, ref_l = (
                sequence_logps(x, mask) for x, mask in zip(padded, masks, strict=True)
            )
            return losses_of((ref_w, ref_l), lengths)[name](y_w, y_l)

        value, grad = jax.value_and_grad(loss)(padded)
        assert not np.any(np.asarray(grad)[~masks])
        return value, np.where(masks, grad, 0)[..., :longest]

    value, grad = value_and_grad(longest, 0.0)
    assert np.abs(grad[0]).max() > 0
    for slots, filler in ((longest, np.nan), (longest + 5, -np.inf), (longest + 64, 7.0)):
        other_value, other_grad = value_and_grad(slots, filler)
        # More slots may be summed in another order.
        np.testing.assert_allclose(other_value, value, rtol=TOLERANCE)
        np.testing.assert_allclose(other_grad, grad, rtol=TOLERANCE)


def test_importing_the_losses_imports_jax_alone():
    code = """
import sys
import cipo_jax.losses
heavy = {"flax", "optax", "transformers", "grain", "ml_collections", "jaxtyping", "orbax", "torch"}
assert "jax" in sys.modules
print(sorted(heavy & set(sys.modules)))
"""
    root = str(Path(cipo_jax.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
