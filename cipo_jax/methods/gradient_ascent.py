"""Gradient ascent and its weighted forms: ga, grad_diff, kl, wga, satimp."""

import dataclasses

from cipo_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class GradientAscentConfig:
    """Weights of WGA (arXiv 2502.19301) and SatImp (arXiv 2505.11953)."""

    beta: float | None = setting(
        None, "power of p in the weight of a token; None for WGA's 1 or SatImp's 5", 0.0
    )
    importance: float = setting(1.0, "SatImp: power of 1 - p in the weight of a token", 0.0)
