"""Settings of CiPO's loop and loss."""

import dataclasses
from typing import Literal

from cipo_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class CipoConfig:
    """The CiPO loop and its loss (arXiv 2604.15847)."""

    iterations: int = setting(4, "iterations of sampling, pairing and optimizing, at most", 1)
    num_samples: int = setting(2, "rollouts of each forget question in an iteration", 1)
    loss: Literal["dpo", "ipo", "simpo"] = setting("dpo", "the preference loss")
    reject: Literal["all", "leaking"] = setting(
        "leaking", "which rollouts are rejected completions: all, or those that leak"
    )
    beta: float | None = setting(
        None, "the preference loss's beta; None for its own: 0.1, or 2 for SimPO", above=0.0
    )
    gamma: float = setting(0.5, "SimPO's target margin", 0.0)
    label_smoothing: float = setting(
        0.0, "share of pairs taken to be the wrong way round, in DPO and SimPO", 0.0, 0.499
    )
    nll_weight: float = setting(0.2, "weight of the NLL of chosen completions", 0.0)
    retain_weight: float = setting(1.0, "weight of the NLL of retained facts and reasoning", 0.0)
    reference: Literal["base", "initial", "previous_iteration", "ema"] = setting(
        "previous_iteration",
        "the preference loss's reference: the base parameters, those after the warm-up, those at "
        "the iteration's start, or a moving average",
    )
    ema_decay: float = setting(0.99, "decay of the moving average, per step", 0.0, 1.0)
