import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cipo_jax.ops import rope as rope_ops
from cipo_jax.ops.rope import Rope, frequencies, rotation

rotate = jax.jit(rope_ops.rotate)
# Bases so small, and contexts so short, that each branch has dimensions of its own.
LLAMA3 = Rope(100.0, "llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = Rope(500.0, "yarn", 4.0, 64, beta_fast=3.0, beta_slow=0.7, scale=1.2)
DYNAMIC = Rope(500.0, "dynamic", 2.0, 32)
PLAIN = Rope()
H = 16


@functools.partial(jax.jit, static_argnums=2)
def turn(x, positions, rope=PLAIN, seq_len=None):
    return rope_ops.rotate(x, rotation(rope, x.shape[-1], positions, seq_len))


def reference(x, positions, theta):
    """Each pair (x_i, x_{i + H/2}) as a complex number, turned by its angle; float64."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    angles = np.asarray(positions)[..., None] * theta ** (-2.0 * np.arange(half) / x.shape[-1])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[..., None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [16, 10])
def test_equals_complex_rotation(theta, head_dim):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 3, head_dim)), jnp.float32)
    positions = jnp.array([[0, 1, 2, 3, 4], [0, 7, 100, 2000, 4000]])
    found, wanted = turn(x, positions, Rope(theta)), reference(x, positions, theta)
    # A float32 angle near 4000 is known to 2**-12 or so.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-3)
    np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=2e-6)


ROPES = [
    PLAIN,
    Rope(kind="linear", factor=3.0),
    LLAMA3,
    dataclasses.replace(YARN, scale=1.0),
    DYNAMIC,
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
def test_scores_depend_on_the_distance_alone(rope):
    rng = np.random.default_rng(1)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, H)), jnp.float32)

    def score(query_at, key_at):
        # Of a dynamic rope this holds while the sequence has the same length.
        seq_len = jnp.array([[130]])
        turned = [
            turn(x, jnp.array([[at]]), rope, seq_len) for x, at in ((q, query_at), (k, key_at))
        ]
        return float(np.vdot(*turned))

    # Sums of 16 products near 1, with angles up to 120 known to 1e-5.
    for distance in (0, 3, 17):
        wanted = score(distance, 0)
        for key_at in (1, 20, 100):
            assert score(key_at + distance, key_at) == pytest.approx(wanted, abs=2e-4)
    assert abs(score(3, 0) - score(17, 0)) > 1e-2


def test_position_zero_turns_nothing_and_lengths_are_kept():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2, 8)), jnp.float32)
    np.testing.assert_array_equal(turn(x, jnp.zeros(4, jnp.int32)), x)
    turned = turn(x, jnp.arange(1, 5))
    assert np.max(np.abs(turned - x)) > 0.1
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
    )


def test_narrow_inputs_are_turned_by_float32_angles():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 1, 2, H)), jnp.bfloat16)
    positions = jnp.array([[3001]])
    found = turn(x, positions)
    assert found.dtype == jnp.bfloat16
    wanted = turn(x.astype(jnp.float32), positions).astype(jnp.bfloat16)
    # An angle rounded to bfloat16 would be off by whole radians here.
    np.testing.assert_array_equal(found.astype(jnp.float32), wanted.astype(jnp.float32))


def test_a_layer_without_rope_is_not_rotated_at_all():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 2, H)), jnp.float32)
    np.testing.assert_array_equal(turn(x, jnp.array([[0, 5, 999]] * 2), None), x)


def test_linear_divides_positions():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(1, 4, 2, H)), jnp.float32)
    positions = jnp.array([[0, 3, 30, 300]])
    wanted = turn(x, positions // 3)
    found = turn(x, positions, Rope(kind="linear", factor=3.0))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)


def test_llama3_leaves_short_wavelengths_alone_and_stretches_long_ones_whole():
    plain, found = frequencies(Rope(LLAMA3.theta), H), frequencies(LLAMA3, H)
    wavelengths = 2 * np.pi / plain
    short, long = wavelengths < 64 / 4, wavelengths > 64 / 1
    between = ~short & ~long
    assert short.any() and long.any() and between.sum() > 1
    np.testing.assert_array_equal(found[short], plain[short])
    np.testing.assert_allclose(found[long], plain[long] / 8, rtol=1e-6)
    # A share of each, which falls with the wavelength's reciprocal.
    share = (64 / wavelengths[between] - 1) / 3
    np.testing.assert_allclose(
        found[between], plain[between] * (share + (1 - share) / 8), rtol=1e-6
    )


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_leaves_fast_dimensions_alone_and_stretches_slow_ones_whole(truncate):
    rope = dataclasses.replace(YARN, truncate=truncate)
    plain, found = frequencies(Rope(rope.theta), H), frequencies(rope, H)
    # Turns within the trained context. Between beta_fast and beta_slow the dimension, which is
    # linear in their logarithm, decides; rounding moves the ends outward.
    turns = 64 * plain / (2 * np.pi)
    at = np.interp(np.log([0.7, 3.0]), np.log(turns[::-1]), np.arange(H // 2)[::-1])
    low, high = at[1], at[0]
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    share = np.clip((np.arange(H // 2) - low) / (high - low), 0, 1)
    assert (share == 0).any() and (share == 1).any() and ((share > 0) & (share < 1)).sum() > 1
    np.testing.assert_allclose(found, plain * (1 - share + share / 4), rtol=1e-5)


def test_truncating_yarn_counts():
    exact = dataclasses.replace(YARN, truncate=False)
    assert np.max(np.abs(frequencies(YARN, H) / frequencies(exact, H) - 1)) > 0.05


def test_yarns_scale_multiplies_what_is_rotated():
    x = jnp.asarray(np.random.default_rng(6).normal(size=(1, 3, 2, H)), jnp.float32)
    positions = jnp.array([[0, 9, 90]])
    unscaled = dataclasses.replace(YARN, scale=1.0)
    np.testing.assert_allclose(
        turn(x, positions, YARN), 1.2 * turn(x, positions, unscaled), rtol=1e-6
    )


def angles(rope, positions, seq_len=None):
    by = rotation(
        rope, H, jnp.asarray(positions), None if seq_len is None else jnp.asarray(seq_len)
    )
    return np.arctan2(by.sin, by.cos)


def test_dynamic_is_plain_within_the_trained_context():
    positions, seq_len = np.arange(31)[None], np.full((1, 31), 32)
    plain = angles(Rope(DYNAMIC.theta), positions)
    np.testing.assert_allclose(angles(DYNAMIC, positions, seq_len), plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(angles(DYNAMIC, positions), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [33, 64, 500])
def test_dynamic_stretches_by_the_length_that_was_known(length):
    # At position 1 the angles are the frequencies. The base grows so that the slowest of them
    # is divided by factor * length / trained - (factor - 1), and the fastest by nothing.
    found = angles(DYNAMIC, [[1]], [[length]])[0, 0]
    stretch = 2 * length / 32 - 1
    theta = DYNAMIC.theta * stretch ** (H / (H - 2))
    np.testing.assert_allclose(found, frequencies(Rope(theta), H), rtol=1e-5)
    plain = frequencies(Rope(DYNAMIC.theta), H)
    assert found[0] == plain[0]
    assert plain[-1] / found[-1] == pytest.approx(stretch, rel=1e-5)


def test_each_token_is_stretched_by_what_it_knew():
    positions, seq_len = [[1, 2, 3], [1, 2, 3]], [[40, 50, 60], [70, 70, 32]]
    found = angles(DYNAMIC, positions, seq_len)
    for row in range(2):
        for t in range(3):
            one = angles(DYNAMIC, [[positions[row][t]]], [[seq_len[row][t]]])
            np.testing.assert_allclose(found[row, t], one[0, 0], rtol=1e-6)
    # By default a row's length is its last position + 1.
    rows = [[0, 1, 39], [0, 1, 69]]
    np.testing.assert_array_equal(
        angles(DYNAMIC, rows), angles(DYNAMIC, rows, [[40] * 3, [70] * 3])
    )


@pytest.mark.parametrize("rope", [None, *ROPES[:-1]], ids=lambda rope: rope and rope.kind)
def test_what_was_known_matters_to_dynamic_ropes_alone(rope):
    positions = jnp.arange(5)[None]
    found = rotation(rope, H, positions, jnp.full((1, 5), 999))
    wanted = rotation(rope, H, positions)
    np.testing.assert_array_equal(found.cos, wanted.cos)
    np.testing.assert_array_equal(found.sin, wanted.sin)
