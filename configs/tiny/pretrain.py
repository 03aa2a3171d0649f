"""Makes the embedded tiny world and its two models.

python -m cipo_jax pretrain --config=configs/tiny/pretrain.py --out=runs/tiny_lrm
"""

from cipo_jax.config import PretrainConfig, parse_arg, to_config_dict


def get_config(arg=None):
    """The settings that the embedded models were made with; it takes no argument."""
    parse_arg(arg)
    config = to_config_dict(PretrainConfig())
    config.steps = 2000
    config.train.lr = 3e-3
    config.train.warmup_steps = 100
    config.train.lr_schedule = "cosine"
    config.train.weight_decay = 0.01
    config.train.checkpoint_every = 250
    return config
