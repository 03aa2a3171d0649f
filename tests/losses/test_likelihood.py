import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from cipo_jax.losses import nll, sequence_logps

# Everything here runs in float64, so that only the order of a few operations is left to differ.
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def completions(lengths=(5, 1, 9, 3), slots=9, seed=0):
    logps = -np.random.default_rng(seed).uniform(0, 4, size=(len(lengths), slots))
    return logps, np.arange(slots) < np.array(lengths)[:, None]


def by_hand(logps, mask, average):
    rows = [row[real] for row, real in zip(logps, mask, strict=True) if real.any()]
    if average == "token":
        return -np.mean(np.concatenate(rows))
    return -np.mean([np.mean(row) for row in rows])


def test_sequence_logps_sums_what_is_real():
    logps, mask = completions()
    wanted = [row[real].sum() for row, real in zip(logps, mask, strict=True)]
    np.testing.assert_allclose(sequence_logps(logps, mask), wanted, rtol=TOLERANCE)
    np.testing.assert_allclose(sequence_logps(logps, mask.astype(np.int32)), wanted, rtol=TOLERANCE)


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("lengths", [(5, 1, 9, 3), (5, 0, 9, 0)])
def test_nll_equals_its_formula(average, lengths):
    logps, mask = completions(lengths)
    loss, metrics = nll(logps, mask, average)
    np.testing.assert_allclose(loss, by_hand(logps, mask, average), rtol=TOLERANCE)
    assert set(metrics) == {"nll"}
    assert metrics["nll"] == loss


def test_nll_averages_over_sequences_unless_told_otherwise():
    logps, mask = completions()
    sequence, token = (by_hand(logps, mask, average) for average in ("sequence", "token"))
    assert abs(sequence - token) > 1e-2
    np.testing.assert_allclose(nll(logps, mask)[0], sequence, rtol=TOLERANCE)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_nll_of_nothing_is_zero(average):
    logps, mask = completions((0, 0))
    value, grad = jax.value_and_grad(lambda x: nll(x, mask, average)[0])(logps)
    assert value == 0
    assert not np.any(grad)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_nll_gradients_equal_finite_differences(average):
    logps, mask = completions()
    # The loss is linear: central differences are exact up to float64's rounding.
    check_grads(
        lambda x: nll(x, mask, average)[0], (logps,), order=1, modes=["rev"], atol=1e-8, rtol=1e-8
    )


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_padding_has_no_influence_on_values_and_gradients(average):
    logps, mask = completions()
    loss = jax.value_and_grad(lambda x, mask: nll(x, mask, average)[0])
    value, grad = loss(logps, mask)
    assert np.all(np.asarray(grad)[mask] < 0)
    for filler, more in ((np.nan, 0), (-np.inf, 0), (np.nan, 23), (3.0, 1)):
        padding = ((0, 0), (0, more))
        other = np.pad(np.where(mask, logps, filler), padding, constant_values=filler)
        other_mask = np.pad(mask, padding)
        other_value, other_grad = loss(other, other_mask)
        # More slots may be summed in another order.
        np.testing.assert_allclose(other_value, value, rtol=TOLERANCE)
        np.testing.assert_allclose(
            other_grad, np.pad(np.where(mask, grad, 0), padding), rtol=TOLERANCE
        )


def test_the_mean_over_micro_batches_is_that_of_the_batch():
    logps, mask = completions((5, 1, 9, 3, 2, 8))

    def over_micro_batches(logps, average):
        parts = zip(np.split(np.arange(6), 3), strict=True)
        return sum(nll(logps[part], mask[part], average)[0] for (part,) in parts) / 3

    whole, grad = jax.value_and_grad(lambda x: nll(x, mask)[0])(logps)
    parts, parts_grad = jax.value_and_grad(lambda x: over_micro_batches(x, "sequence"))(logps)
    np.testing.assert_allclose(parts, whole, rtol=TOLERANCE)
    np.testing.assert_allclose(parts_grad, grad, rtol=TOLERANCE)
    # The mean over tokens has no such property.
    assert abs(over_micro_batches(logps, "token") - nll(logps, mask, "token")[0]) > 1e-3
