"""Negative preference optimization: npo, simnpo."""

import dataclasses

from cipo_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class NpoConfig:
    """NPO (arXiv 2404.05868) and SimNPO (arXiv 2410.07163)."""

    beta: float | None = setting(
        None, "the loss's beta; None for NPO's 0.1 or SimNPO's 4.5", above=0.0
    )
    delta: float = setting(0.0, "SimNPO's margin", 0.0)
