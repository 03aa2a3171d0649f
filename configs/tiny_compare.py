"""Every method on the embedded tiny world, tuned alike, over three seeds.

python -m cipo_jax compare --config=configs/tiny_compare.py --workdir=runs/compare

--config=configs/tiny_compare.py:smoke runs all of it on few questions and one seed, in minutes.
"""

from cipo_jax.data import tiny_world


def get_config(arg=None):
    """The comparison's settings.

    Args:
      arg: "smoke" for few questions, one seed, one learning rate.
    """
    config = tiny_world.compared_config()

    # A round, or an iteration, is half an epoch over the forget questions, and every method has two
    # epochs: four rounds, or CiPO's warm-up and two iterations.
    config.train.epochs = 0.5
    config.baseline.rounds = 4
    # Of all rounds and rates validation keeps the one of highest harmonic mean of 1 - leak and
    # utility; nobody stops early, since what is lost in one round may heal in the next.
    config.cipo.leak_goal = 1.0
    config.cipo.patience = 4

    config.warmup.epochs = 1.0
    config.cipo.iterations = 2

    # The same weight for what every method keeps. With weights of 1 or less, as papers have it for
    # large models, GradDiff, NPO and TRU lose all the other people here: 0 to 5 % are left.
    config.baseline.retain_weight = 5.0
    # These have weights of their own scale: of states, beside small gradients, of a dual variable.
    config.compare.own = """
    rmu, r2mu: baseline.retain_weight=1.4
    simnpo, satimp, pdu: baseline.retain_weight=1
    """
    config.baseline.layer = 2  # of four
    config.baseline.alternates = 1  # More would be more steps than others have.

    config.compare.seeds = 3
    # Two rates each, around the best of a first try of seed 0 with three: some losses have small
    # gradients near what they push away, and RMU trains three matrices alone.
    config.compare.lrs = """
    2e-4, 8e-4; simnpo, satimp, answer_idk: 8e-4, 3.2e-3; rmu, r2mu: 1.28e-2, 5.12e-2
    """
    config.compare.workers = 2

    if arg == "smoke":
        config.compare.seeds = 1
        config.compare.lrs = ""
        config.data.valid_rows = 8
        config.data.eval_rows = 16
        config.forget.count = 1
        config.baseline.rounds = config.cipo.iterations = 1
    elif arg:
        raise ValueError(f"tiny_compare: {arg!r} is not known; smoke is")
    return config
