"""One of two processes that load and save a model together; started by test_safetensors.py.

    python loading_process.py PORT PROCESS FOLDER OUT

Prints as JSON how many bytes of each tensor this process read, and whether each of its slices holds
what the file holds there.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "2"

import jax
import jax.experimental.multihost_utils
import numpy as np
from plain_reading import counted_reads, plain_params

from cipo_jax.data.tiny_tokenizer import train_tokenizer
from cipo_jax.models.decoder import abstract_params
from cipo_jax.models.hf_config import read_config
from cipo_jax.models.hf_fields import read_fields
from cipo_jax.models.safetensors_load import load_params
from cipo_jax.models.safetensors_save import save_folder
from cipo_jax.training.mesh import make_mesh, param_shardings


def main(port, process, folder, out):
    folder = Path(folder)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    config = read_config(folder)
    shardings = param_shardings(abstract_params(config), make_mesh(1, 4, 1))
    with counted_reads() as reads:
        params = load_params(folder, config, shardings)

    def right(x, wanted):
        own = x.addressable_shards
        return len(own) == 2 and all(np.array_equal(s.data, wanted[s.index]) for s in own)

    equal = jax.tree.map(right, params, plain_params(folder, config))
    tokenizer = train_tokenizer(["Who wrote The Sea?"], 280)
    save_folder(out, config, params, tokenizer, read_fields(folder))
    jax.experimental.multihost_utils.sync_global_devices("saved")
    print(
        json.dumps(
            {
                "read": {name: sum(sizes) for name, sizes in reads.items()},
                "right": all(jax.tree.leaves(equal)),
                "there": Path(out).is_dir(),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
