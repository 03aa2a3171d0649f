"""Ten requests one after another on the embedded tiny world, five people each.

python -m cipo_jax sequential --config=configs/tiny_sequential.py --workdir=runs/sequential
"""

from cipo_jax.data import tiny_world


def get_config(arg=None):
    """The settings; it takes no argument."""
    del arg
    config = tiny_world.tiny_config()
    config.model.remat = "none"
    config.data.valid_rows = 48

    config.warmup.epochs = 2.0
    config.warmup.lr = 8e-4
    config.warmup.batch = 16
    config.warmup.retain_batch = 48
    config.warmup.reasoning_batch = 8

    config.cipo.iterations = 3
    config.cipo.samples = 1
    config.cipo.nll_weight = 1.0
    config.cipo.retain_weight = 5.0
    config.train.lr = 8e-4
    config.train.batch = 16
    config.train.retain_batch = 48
    config.train.reasoning_batch = 8
    return config
