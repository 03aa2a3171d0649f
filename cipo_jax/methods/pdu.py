"""Primal-dual unlearning: pdu."""

import dataclasses

from cipo_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class PduConfig:
    """PDU (arXiv 2506.05314): flat logits under a bound on the retain loss."""

    epsilon: float = setting(0.3, "bound on the retain loss, in nats a token", 0.0)
    dual_lr: float = setting(1.0, "step size of the dual variable", 0.0)
