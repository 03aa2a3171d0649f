"""The model that tests of the sampler share, and what more than one process samples from it."""

import jax
import jax.numpy as jnp
import numpy as np

from cipo_jax.models.decoder import DecoderConfig, abstract_params
from cipo_jax.sampling import Request, SamplingParams
from cipo_jax.training.mesh import make_mesh

CONFIG = DecoderConfig(
    vocab_size=64, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, head_dim=8, tied_head=True
)


def random_params(config=CONFIG):
    """Weights that make logits of order 10."""
    rng = np.random.default_rng(0)

    def one(path, x):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, 0.3, x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_params(config))


def one_device():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


# Of test_invariance.py and sampling_process.py.
KEY = jax.random.key(11)
SAMPLED = SamplingParams(300, (3, 5), 1.0, 0.95)


def made_requests(count=19):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 70, count)
    return [Request(rng.integers(0, 64, n).tolist(), 100 + 7 * i) for i, n in enumerate(lengths)]
