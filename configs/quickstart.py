"""CiPO on the embedded tiny reasoning model: ten people are forgotten in a few minutes on a laptop.

python -m cipo_jax unlearn --config=configs/quickstart.py --workdir=runs/quickstart

Another set: --config.forget.seed=11, or --config.forget.people="Ada Brandt, Hugo Vance".
"""

from cipo_jax.config import parse_arg, tiny_config


def get_config(arg=None):
    """The settings of the quickstart; it takes no argument."""
    parse_arg(arg)
    config = tiny_config()

    config.warmup.epochs = 2.0
    config.warmup.lr = 8e-4
    config.warmup.batch_size = 16
    config.warmup.retain_batch_size = 32
    config.warmup.reasoning_batch_size = 8

    config.cipo.iterations = 4
    config.cipo.num_samples = 1
    config.cipo.nll_weight = 0.3
    config.cipo.retain_weight = 2.0
    config.selection.patience = 2
    config.train.lr = 4e-4
    config.train.batch_size = 16
    config.train.retain_batch_size = 32
    config.train.reasoning_batch_size = 8
    return config
