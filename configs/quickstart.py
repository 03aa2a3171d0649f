"""CiPO on the embedded tiny reasoning model: ten people are forgotten in a few minutes on a laptop.

python -m cipo_jax unlearn --config=configs/quickstart.py --workdir=runs/quickstart

Another set: --config.forget.seed=11, or --config.forget.people="Ada Brandt, Hugo Vance".
"""

from cipo_jax.data import tiny_world


def get_config(arg=None):
    """The quickstart's settings; it takes no argument."""
    del arg
    config = tiny_world.tiny_config()

    config.warmup.epochs = 2.0
    config.warmup.lr = 8e-4
    config.warmup.batch = 16
    config.warmup.retain_batch = 32
    config.warmup.reasoning_batch = 8

    config.cipo.iterations = 4
    config.cipo.samples = 1
    config.cipo.patience = 2
    config.cipo.nll_weight = 0.3
    config.cipo.retain_weight = 2.0
    config.train.lr = 4e-4
    config.train.batch = 16
    config.train.retain_batch = 32
    config.train.reasoning_batch = 8
    return config
