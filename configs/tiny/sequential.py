"""Ten forget requests one after another on the embedded tiny world, five people each.

python -m cipo_jax sequential --config=configs/tiny/sequential.py --workdir=runs/sequential
"""

from cipo_jax.config import compared_config, parse_arg


def get_config(arg=None):
    """The settings; it takes no argument."""
    parse_arg(arg)
    config = compared_config()

    config.warmup.epochs = 2.0
    config.cipo.iterations = 3
    # Rehearsed examples share their batch with retained facts.
    config.warmup.retain_batch_size = config.train.retain_batch_size = 48
    return config
