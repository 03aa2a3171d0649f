"""The mean over micro-batches is the loss of the whole batch, for every loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_trees_close

from cipo_jax import losses

B, C, V, D, MICRO = 6, 7, 11, 5, 2


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def masks(seed):
    """[B, C], of rows of very different lengths, one of them empty."""
    lengths = np.random.default_rng(seed).permutation([0, 1, 2, 5, 7, 7])
    return np.arange(C) < lengths[:, None]


def tokens(seed):
    return -np.random.default_rng(seed).uniform(0.05, 4.0, (B, C))


def sums(seed):
    return -np.random.default_rng(seed).uniform(1.0, 30.0, B)


def normal(seed, size):
    return np.random.default_rng(seed).normal(0, 2, (B, C, size))


TARGETS = np.random.default_rng(9).integers(0, V, (B, C))
LENGTHS = np.array([3, 5, 9, 2, 14, 4]), np.array([7, 2, 6, 12, 3, 8])
WEIGHTS = np.array([1.0, 0.0, 1.0, 0.5, 1.0, 0.0])
DIRECTION = np.ones(D) / np.sqrt(D)


class Rows:
    """Some rows of a batch, and the divisors of their means."""

    def __init__(self, rows, parts):
        self.rows, self.parts = rows, parts

    def __call__(self, *arrays):
        return [jnp.asarray(x)[self.rows] for x in arrays]

    def tokens(self, mask):
        return None if self.parts == 1 else jnp.asarray(mask.sum() / self.parts)

    def sequences(self, mask):
        return None if self.parts == 1 else jnp.asarray(mask.any(axis=1).sum() / self.parts)


F, R, T, K = (masks(i) for i in range(4))
PAIRS = [sums(i) for i in range(4)]
# name -> (loss of the rows and of the differentiable array, that array)
CASES = {
    "nll": (lambda r, x: losses.nll(x, *r(F), num_sequences=r.sequences(F)), tokens(1)),
    "nll token": (lambda r, x: losses.nll(x, *r(F), "token", num_tokens=r.tokens(F)), tokens(1)),
    "ga": (lambda r, x: losses.ga(x, *r(F), num_tokens=r.tokens(F)), tokens(1)),
    "grad_diff": (
        lambda r, x: losses.grad_diff(
            x, *r(F), 2 * x, *r(R), forget_num_tokens=r.tokens(F), retain_num_tokens=r.tokens(R)
        ),
        tokens(1),
    ),
    "tru": (
        lambda r, x: losses.tru(
            x, *r(T), 2 * x, *r(F), 3 * x, *r(R),
            trace_num_sequences=r.sequences(T),
            forget_num_tokens=r.tokens(F),
            retain_num_tokens=r.tokens(R),
        ),
        tokens(1),
    ),
    "wga": (lambda r, x: losses.wga(x, *r(F), num_tokens=r.tokens(F)), tokens(1)),
    "satimp": (lambda r, x: losses.satimp(x, *r(F), num_tokens=r.tokens(F)), tokens(1)),
    "npo": (lambda r, x: losses.npo(x, *r(PAIRS[1])), PAIRS[0]),
    "simnpo": (lambda r, x: losses.simnpo(x, *r(LENGTHS[0])), PAIRS[0]),
    "idk_dpo": (lambda r, x: losses.idk_dpo(x, *r(*PAIRS[1:])), PAIRS[0]),
    "dpo": (lambda r, x: losses.dpo(x, *r(*PAIRS[1:]), weights=r(WEIGHTS)[0]), PAIRS[0]),
    "hinge": (lambda r, x: losses.hinge(x, *r(*PAIRS[1:])), PAIRS[0]),
    "robust_dpo": (
        lambda r, x: losses.robust_dpo(x, *r(*PAIRS[1:]), label_smoothing=0.2), PAIRS[0],
    ),
    "ipo": (lambda r, x: losses.ipo(x, *r(*PAIRS[1:], *LENGTHS)), PAIRS[0]),
    "simpo": (lambda r, x: losses.simpo(x, *r(PAIRS[1], *LENGTHS)), PAIRS[0]),
    "cpo": (lambda r, x: losses.cpo(x, *r(PAIRS[1], LENGTHS[0])), PAIRS[0]),
    "orpo": (lambda r, x: losses.orpo(x, *r(PAIRS[1], *LENGTHS)), PAIRS[0]),
    "kl": (lambda r, x: losses.kl(x, *r(normal(2, V), F), num_tokens=r.tokens(F)), normal(1, V)),
    "kd": (
        lambda r, x: losses.kd(x, *r(normal(2, V), F), temperature=2.0, num_tokens=r.tokens(F)),
        normal(1, V),
    ),
    "ceu": (lambda r, x: losses.ceu(x, *r(TARGETS, F), num_tokens=r.tokens(F)), normal(1, V)),
    "undial": (
        lambda r, x: losses.undial(x, *r(normal(2, V), TARGETS, F), num_tokens=r.tokens(F)),
        normal(1, V),
    ),
    "flatness": (lambda r, x: losses.flatness(x, *r(F), num_tokens=r.tokens(F)), normal(1, V)),
    "rmu_forget": (
        lambda r, x: losses.rmu_forget(x, *r(F), DIRECTION, num_tokens=r.tokens(F)), normal(1, D),
    ),
    "hidden_match": (
        lambda r, x: losses.hidden_match(x, *r(normal(2, D), F), num_tokens=r.tokens(F)),
        normal(1, D),
    ),
    "r2mu": (
        lambda r, x: losses.r2mu(
            (x, *r(F)), (2 * x, *r(normal(2, D), R)), (3 * x, *r(T)), (x, *r(normal(3, D), K)),
            DIRECTION,
            num_tokens=tuple(r.tokens(mask) for mask in (F, R, T, K)),
        ),
        normal(1, D),
    ),
}  # fmt: skip

NO_LOSSES = {"control_vector", "dual_ascent", "over_chunks", "sequence_logps", "token_mean"}


def test_every_loss_is_there():
    names = {n for n in losses.__all__ if not n.endswith("_per_token")} - NO_LOSSES
    assert {case.split()[0] for case in CASES} == names


@pytest.mark.parametrize("name", list(CASES))
def test_the_mean_over_micro_batches_is_that_of_the_batch(name):
    loss, x = CASES[name]
    # As the train step cuts a batch: row i goes to micro-batch i % n.
    whole = [Rows(np.arange(B), 1)]
    parts = [Rows(np.arange(B)[i::MICRO], MICRO) for i in range(MICRO)]

    def mean(x, groups):
        found = [loss(rows, x[rows.rows]) for rows in groups]
        total = jax.tree.map(lambda *values: sum(values) / len(values), *found)
        return total[0], total

    (_, wanted), wanted_gradient = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(x), whole)
    (_, found), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(x), parts)
    # Accuracies are float32.
    assert_trees_close(found, wanted, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-12)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-12, atol=1e-15)
    assert np.any(gradient)
