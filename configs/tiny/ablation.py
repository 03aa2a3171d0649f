"""CiPO without one of its parts, on the embedded tiny world, over three seeds.

python -m cipo_jax compare --config=configs/tiny/ablation.py --workdir=runs/ablation
"""

from cipo_jax.config import compared_config, parse_arg

VARIANTS = (
    ("CiPO", {"cipo.loss": "dpo"}),
    ("no warm-up", {"warmup.epochs": 0.0}),
    ("no NLL", {"cipo.nll_weight": 0.0}),
    ("no retain term", {"cipo.retain_weight": 0.0}),
    ("no resampling", {"cipo.iterations": 1, "train.epochs": 1.0}),
    ("every rollout rejected", {"cipo.reject": "all"}),
    ("knowledge boundary", {"counterfactual.strategy": "boundary"}),
    ("alternative path", {"counterfactual.strategy": "alternative"}),
    ("SimPO", {"cipo.loss": "simpo"}),
    ("IPO", {"cipo.loss": "ipo"}),
    ("reference initial", {"cipo.reference": "initial"}),
    ("reference base", {"cipo.reference": "base"}),
)


def get_config(arg=None):
    """The settings of the ablation; it takes no argument."""
    parse_arg(arg)
    config = compared_config()

    config.train.epochs = 0.5
    config.selection.leak_goal = 1.0  # Selects by the harmonic mean of 1 - leak and utility alone.
    config.selection.patience = 2  # Both iterations, whatever the first one scores.

    config.warmup.epochs = 1.0
    config.cipo.iterations = 2

    config.compare.variants = VARIANTS
    config.compare.workers = 2
    config.compare.seeds = 3
    return config
