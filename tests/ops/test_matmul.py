import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cipo_jax.ops.matmul import contract


@pytest.mark.parametrize(
    ("axes", "kernel", "spelled"),
    [(1, (6, 5), "btd,df->btf"), (1, (6, 2, 3), "btd,dnh->btnh"), (2, (2, 3, 7), "btnh,nhd->btd")],
)
def test_values_and_gradients_are_those_of_an_einsum(axes, kernel, spelled):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 4, *kernel[:axes])), rng.normal(size=kernel)
    wanted = np.einsum(spelled, x, kernel)
    weights = rng.normal(size=wanted.shape)
    inputs, output = spelled.split("->")
    x_axes, kernel_axes = inputs.split(",")

    def weighted(x, kernel):
        y = contract(x, kernel, axes)
        return jnp.sum(y * weights), y

    x32, kernel32 = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    (d_x, d_kernel), y = jax.grad(weighted, (0, 1), has_aux=True)(x32, kernel32)
    # f32 sums of a few numbers near 1.
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    by_x = np.einsum(f"{output},{kernel_axes}->{x_axes}", weights, kernel)
    by_kernel = np.einsum(f"{x_axes},{output}->{kernel_axes}", x, weights)
    np.testing.assert_allclose(d_x, by_x, atol=1e-5)
    np.testing.assert_allclose(d_kernel, by_kernel, atol=1e-5)


def test_the_gradient_of_the_kernel_is_one_product():
    """Its axes come out in order, so that no transpose follows."""
    x, kernel = jnp.ones((2, 4, 6)), jnp.ones((6, 2, 3))
    backward = jax.make_jaxpr(jax.grad(lambda k: jnp.sum(contract(x, k, 1))))(kernel)
    assert "transpose" not in str(backward)
