"""What tests say of trees of arrays."""

import jax
import numpy as np


def _pairs(found, wanted):
    """(path, array found there, array wanted there), of trees that have the same structure."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, a), b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        yield jax.tree_util.keystr(path), np.asarray(a), np.asarray(b)


def assert_trees_equal(found, wanted):
    """The same structure, and at each place the same dtype, shape and numbers."""
    for path, a, b in _pairs(found, wanted):
        np.testing.assert_array_equal(a, b, err_msg=path, strict=True)


def assert_trees_close(found, wanted, *, atol, rtol=0.0):
    """The same structure, and at each place the same numbers but for `atol` and `rtol`."""
    for path, a, b in _pairs(found, wanted):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=path)
