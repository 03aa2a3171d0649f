"""Methods that train on targets which are fixed before training starts."""

import dataclasses
from typing import Literal

from cipo_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class FixedTargetConfig:
    """The loop of every method but CiPO, and how it retains facts and reasoning."""

    rounds: int = setting(
        2, "rounds of train.epochs epochs; each is validated and the best is kept", 1
    )
    span: Literal["both", "cot", "answer"] = setting(
        "both", "tokens of a forget completion that the forget loss acts on"
    )
    forget_weight: float | None = setting(
        None, "weight of the forget loss; None for the method's own", 0.0
    )
    retain: Literal["none", "nll", "kl", "kd", "hidden"] | None = setting(
        None,
        "the retain loss: none, NLL of the data, KL or distillation from the base parameters, or "
        "distance to their hidden states; None for the method's own",
    )
    retain_weight: float | None = setting(
        None, "weight of the retain loss; None for the method's own", 0.0
    )
    temperature: float = setting(1.0, 'temperature of distillation in retain="kd"', 0.01)
    layer: int | None = setting(
        None,
        'layer whose output retain="hidden" matches, from 0; None for representation.layer',
        0,
    )
