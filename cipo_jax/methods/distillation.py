"""Distillation from the base parameters: undial, kd, ceu."""

import dataclasses

from cipo_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """UNDIAL (arXiv 2402.10052); kd and ceu have no setting of their own."""

    beta: float = setting(10.0, "UNDIAL: amount by which the true token's logit is lowered", 0.0)
