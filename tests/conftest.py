"""Eight fake CPU devices for all tests, and shape annotations checked as the code runs."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Commands would keep their programs in the home folder.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

# Before anything of the package is imported: every jaxtyping annotation there becomes a check.
install_import_hook(["cipo_jax.ops", "cipo_jax.models.decoder", "cipo_jax.sampling",
                     "cipo_jax.training"], "beartype.beartype")  # fmt: skip

import jax
import pytest

from cipo_jax.models.decoder import DecoderConfig
from cipo_jax.training.mesh import make_mesh


@pytest.fixture
def one_device():
    """A mesh of a single device."""
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture
def dummy_config():
    """A decoder small enough for anything: GQA 4/2, tied head."""
    return DecoderConfig(
        vocab_size=64, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, head_dim=8,
        tied_head=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules that test what is computed, not how fast: compiling is most of their time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def real_compilation(quick_compilation):
    """For the tests in such modules that look at what the compiler makes."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
