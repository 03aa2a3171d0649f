"""The names that the package hands out."""

import subprocess
import sys

import pytest

import cipo_jax


def test_every_name_is_there():
    for name in cipo_jax.__all__:
        assert getattr(cipo_jax, name) is not None, name
        assert name in dir(cipo_jax)
    assert "__version__" in dir(cipo_jax)
    assert cipo_jax.losses.__name__ == "cipo_jax.losses"


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'cipo_jax' has no attribute 'Nothing'"):
        _ = cipo_jax.Nothing


def test_importing_the_package_imports_nothing():
    code = """
import sys
import cipo_jax
cipo_jax.UserError
heavy = {"jax", "numpy", "flax", "optax", "transformers", "grain", "ml_collections", "torch"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
