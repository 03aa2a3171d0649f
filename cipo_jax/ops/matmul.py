"""The matrix product of projections."""

import functools

import jax
import jax.numpy as jnp

from cipo_jax.typing import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract(x: Array, kernel: Array, axes: int) -> Array:
    """A tensordot over the last `axes` of x; the gradient of the kernel is one matrix product.

    Args:
      x: [..., *inputs].
      kernel: [*inputs, *outputs].
      axes: number of axes in `inputs`.

    Returns:
      [..., *outputs].
    """
    return jnp.tensordot(x, kernel, axes)


def _forward(x: Array, kernel: Array, axes: int) -> tuple[Array, tuple[Array, Array]]:
    return jnp.tensordot(x, kernel, axes), (x, kernel)


def _backward(axes: int, residuals: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    outputs = kernel.ndim - axes
    tokens = tuple(range(x.ndim - axes))
    d_x = jax.lax.dot_general(
        d, kernel, ((range(d.ndim - outputs, d.ndim), range(axes, kernel.ndim)), ((), ()))
    )
    return d_x, jax.lax.dot_general(x, d, ((tokens, tokens), ((), ())))


contract.defvjp(_forward, _backward)
