"""CiPO without one of its parts, on the embedded tiny world, over three seeds.

python -m cipo_jax compare --config=configs/tiny_ablation.py --workdir=runs/ablation
"""

from cipo_jax.data import tiny_world

VARIANTS = """
CiPO: cipo.loss=dpo
no warm-up: warmup.epochs=0
no NLL: cipo.nll_weight=0
no retain term: cipo.retain_weight=0
no resampling: cipo.iterations=1, train.epochs=1
every rollout rejected: cipo.reject=all
knowledge boundary: counterfactual.strategy=boundary
alternative path: counterfactual.strategy=alternative
SimPO: cipo.loss=simpo
IPO: cipo.loss=ipo
reference initial: cipo.reference=initial
reference base: cipo.reference=base
"""


def get_config(arg=None):
    """The ablation's settings; it takes no argument."""
    del arg
    config = tiny_world.compared_config()

    config.train.epochs = 0.5
    config.cipo.leak_goal = 1.0  # The round of highest harmonic mean of 1 - leak and utility.
    config.cipo.patience = 2  # Both iterations, whatever the first has come to.

    config.warmup.epochs = 1.0
    config.cipo.iterations = 2

    config.compare.variants = VARIANTS
    config.compare.workers = 2
    config.compare.seeds = 3
    return config
