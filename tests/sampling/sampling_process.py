"""One of two processes that sample together; started by test_invariance.py.

    python sampling_process.py PORT PROCESS

Prints its completions as JSON.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "2"

import jax


def main():
    # These make arrays, which they may only once the processes know of each other.
    from small_model import CONFIG, KEY, SAMPLED, made_requests, random_params

    from cipo_jax.models.decoder import Compute, abstract_params
    from cipo_jax.sampling import Sampler, SamplingJob
    from cipo_jax.training.mesh import make_mesh, param_shardings

    mesh = make_mesh(1, 2, 2)
    # The weights as training leaves them: sharded over both processes.
    shardings = param_shardings(abstract_params(CONFIG), mesh)
    params = jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]),
        jax.tree.map(jax.device_get, random_params()),
        shardings,
    )
    sampler = Sampler(CONFIG, Compute(), mesh, 4, 16)
    prepared = sampler.prepare(params)
    made = sampler.stream(prepared, SamplingJob(made_requests()[:8], SAMPLED, KEY, 2))
    results = {"completions": [[c.item, c.sample, c.ids, c.stop] for c in made]}
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
    main()
