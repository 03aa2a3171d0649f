"""Misdirected representations: rmu, r2mu."""

import dataclasses

from cipo_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class RepresentationConfig:
    """RMU (arXiv 2403.03218) and R2MU (arXiv 2506.12963)."""

    layer: int = setting(7, "layer whose output is driven to the control vector, from 0", 0)
    scale: float = setting(6.5, "length of the control vector", 0.0)
    layers: tuple[int, ...] | None = setting(
        None, "layers that are trained; None for `layer` and the two below", 0
    )
    target_modules: tuple[str, ...] = setting(
        ("down_proj",), "projections that are trained, by their names in transformers"
    )
    trace_weight: float = setting(
        1.0, "R2MU: weight of the loss on self-generated chains of thought", 0.0
    )
    reasoning_weight: float = setting(
        1.0, 'weight of retained reasoning in retain="hidden"; facts have retain_weight', 0.0
    )
    trace_tokens: int = setting(
        100, "R2MU: tokens of a self-generated chain of thought, from its start", 1
    )
