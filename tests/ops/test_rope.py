import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cipo_jax.ops import rope as rope_ops

rope = jax.jit(rope_ops.rope, static_argnums=2)


def reference(x, positions, theta):
    """Each pair (x_i, x_{i + H/2}) as a complex number, turned by its angle; float64."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    angles = np.asarray(positions)[..., None] * theta ** (-2.0 * np.arange(half) / x.shape[-1])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[..., None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_equals_complex_rotation(theta):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 16)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [0, 7, 100, 2000, 4000]])
    # A float32 angle near 4000 is known to 2**-12 or so.
    np.testing.assert_allclose(
        rope(x, positions, theta), reference(x, positions, theta), rtol=0, atol=2e-3
    )
    np.testing.assert_allclose(
        rope(x, positions, theta)[0], reference(x, positions, theta)[0], rtol=0, atol=2e-6
    )


def test_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(query_at, key_at):
        turned = [rope(x, np.array([[at]]), 10000.0) for x, at in ((q, query_at), (k, key_at))]
        return float(np.vdot(*turned))

    # Sums of 16 products near 1, with angles up to 120 known to 1e-5.
    for distance in (0, 3, 17):
        wanted = score(distance, 0)
        for key_at in (1, 20, 100):
            assert score(key_at + distance, key_at) == pytest.approx(wanted, abs=2e-4)
    assert abs(score(3, 0) - score(17, 0)) > 1e-2


def test_position_zero_turns_nothing_and_lengths_are_kept():
    x = np.random.default_rng(2).normal(size=(4, 2, 8)).astype(np.float32)
    np.testing.assert_array_equal(rope(x, np.zeros(4, np.int32), 10000.0), x)
    turned = rope(x, np.arange(1, 5), 10000.0)
    assert np.max(np.abs(turned - x)) > 0.1
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
    )


def test_narrow_inputs_are_turned_by_float32_angles():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 1, 2, 16)), jnp.bfloat16)
    positions = np.array([[3001]])
    found = rope(x, positions, 10000.0)
    assert found.dtype == jnp.bfloat16
    wanted = rope(x.astype(jnp.float32), positions, 10000.0).astype(jnp.bfloat16)
    # An angle rounded to bfloat16 would be off by whole radians here.
    np.testing.assert_array_equal(found.astype(jnp.float32), wanted.astype(jnp.float32))
