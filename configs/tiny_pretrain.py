"""Makes the embedded tiny world and its two models again, from nothing.

python -m cipo_jax pretrain --config=configs/tiny_pretrain.py --out=runs/tiny_lrm
"""

from cipo_jax.config import PretrainConfig, to_config_dict


def get_config(arg=None):
    """The settings that the embedded models were made with; it takes no argument."""
    del arg
    config = to_config_dict(PretrainConfig())
    config.steps = 2000
    config.train.lr = 3e-3
    config.train.warmup_steps = 100
    config.train.decay = "cosine"
    config.train.weight_decay = 0.01
    config.train.checkpoint_every = 250
    return config
