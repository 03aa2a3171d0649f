"""Ten requests one after another on the embedded tiny world, five people each.

python -m cipo_jax sequential --config=configs/tiny_sequential.py --workdir=runs/sequential
"""

from cipo_jax.data import tiny_world


def get_config(arg=None):
    """The settings; it takes no argument."""
    del arg
    config = tiny_world.compared_config()

    config.warmup.epochs = 2.0
    config.cipo.iterations = 3
    # What is rehearsed shares their batch with facts that are retained.
    config.warmup.retain_batch = config.train.retain_batch = 48
    return config
