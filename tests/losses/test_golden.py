"""The losses against losses.json: TRL's own code and the formulas of open-unlearning.

`tests/golden/make_loss_golden.py` made it and tells how. Rows are padded here with NaN, so that a
loss which looks at padding would show.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cipo_jax import losses

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text("utf-8"))
INPUTS, CASES = GOLDEN["inputs"], GOLDEN["cases"]
# Both sides are float64, and sums of a few dozen terms differ in order alone. TRL computes ORPO
# from float32 log-probabilities, whose rounding (6e-8) log(1 - exp) magnifies a few times.
TOLERANCE, ORPO_TOLERANCE = 1e-11, 2e-6
# Where TRL logs something else under the same name; see the last tests.
OTHER_METRICS = {"ipo": "rewards/", "simpo": "logps/", "orpo": "logps/"}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def padded(rows, filler):
    """[B, C + 2, ...] of rows [C, ...]."""
    rows = [np.asarray(row) for row in rows]
    longest = max(map(len, rows)) + 2
    out = np.full((len(rows), longest, *rows[0].shape[1:]), filler, rows[0].dtype)
    for into, row in zip(out, rows, strict=True):
        into[: len(row)] = row
    return out


def argument(name):
    """An input as our losses take it, or the mask of "forget_..." or "retain_..." rows."""
    if name.endswith("_mask"):
        part = name.removesuffix("mask")
        rows = next(x for key, x in INPUTS.items() if key.startswith(part) and has_rows(x))
        return padded([np.ones(len(row), bool) for row in rows], False)
    x = INPUTS[name]
    if not has_rows(x):
        return np.asarray(x)
    return padded(x, 0 if name.endswith("targets") else np.nan)


def has_rows(x):
    return isinstance(x[0], list)


def name_of(case):
    options = ", ".join(f"{k} {v}" for k, v in case["options"].items())
    return f"{case['loss']}: {options}" if options else case["loss"]


def run(case):
    """Loss, metrics, and the gradients in the arguments that the policy gives."""
    names = case["arguments"]

    def loss(*args):
        return getattr(losses, case["loss"])(*args, **case["options"])

    where = tuple(names.index(name) for name in case["gradients"])
    args = [jnp.asarray(argument(name)) for name in names]
    (value, metrics), gradients = jax.value_and_grad(loss, where, has_aux=True)(*args)
    assert value.dtype == jnp.float64
    return value, metrics, dict(zip(case["gradients"], gradients, strict=True))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_losses_and_gradients_are_those_of_other_code(case):
    tolerance = ORPO_TOLERANCE if case["loss"] == "orpo" else TOLERANCE
    value, metrics, gradients = run(case)
    np.testing.assert_allclose(value, case["value"], rtol=tolerance)
    for name, wanted in case["gradients"].items():
        wanted = padded(wanted, 0.0) if has_rows(wanted) else np.asarray(wanted)
        np.testing.assert_allclose(
            gradients[name], wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max()
        )
    skipped = OTHER_METRICS.get(case["loss"], "nothing")
    for name, wanted in case["metrics"].items():
        if not name.startswith(skipped):
            # Shares of pairs are float32.
            np.testing.assert_allclose(metrics[name], wanted, rtol=max(tolerance, 1e-7))


def test_every_loss_that_others_have_is_there():
    assert {case["loss"] for case in CASES} == {
        "dpo", "hinge", "ipo", "robust_dpo", "cpo", "orpo", "simpo",
        "ga", "grad_diff", "npo", "idk_dpo", "simnpo", "wga", "satimp",
        "kl", "kd", "ceu", "undial", "flatness", "rmu_forget", "hidden_match",
    }  # fmt: skip
    assert GOLDEN["versions"]["trl"]


def test_the_pairs_are_right_and_wrong_and_on_both_sides_of_the_hinge():
    for case in CASES:
        if "rewards/accuracies" in case["metrics"]:
            assert 0 < case["metrics"]["rewards/accuracies"] < 1
        if case["loss"] == "hinge":
            slopes = np.array(case["gradients"]["chosen_logps"])
            assert (slopes == 0).any() and (slopes < 0).any()


def test_rewards_of_ipo_are_per_token_here_and_sums_in_trl():
    """The loss is of means over tokens in both."""
    for case in (case for case in CASES if case["loss"] == "ipo"):
        _, metrics, _ = run(case)
        beta = case["options"]["beta"]
        for side in ("chosen", "rejected"):
            logps, ref = argument(f"{side}_logps"), argument(f"ref_{side}_logps")
            sums = beta * (logps - ref)
            np.testing.assert_allclose(case["metrics"][f"rewards/{side}"], sums.mean())
            means = sums / argument(f"{side}_lengths")
            np.testing.assert_allclose(metrics[f"rewards/{side}"], means.mean())


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_logps_are_sums_here_and_means_over_tokens_in_trls_simpo_and_orpo(loss):
    for case in (case for case in CASES if case["loss"] == loss):
        _, metrics, _ = run(case)
        for side in ("chosen", "rejected"):
            logps, lengths = argument(f"{side}_logps"), argument(f"{side}_lengths")
            np.testing.assert_allclose(metrics[f"logps/{side}"], logps.mean())
            np.testing.assert_allclose(
                case["metrics"][f"logps/{side}"], (logps / lengths).mean(), rtol=ORPO_TOLERANCE
            )
