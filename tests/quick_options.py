"""Options of XLA that shorten compilation; these tests run small models once."""

import jax
import jax.numpy as jnp


def _options():
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # Another version of XLA has other names.
        return None
    return options


QUICK = _options()
