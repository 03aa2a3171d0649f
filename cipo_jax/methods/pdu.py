"""Flat logits on forget completions, with the retain term as a constraint: pdu."""

import dataclasses

from cipo_jax import losses
from cipo_jax.methods.base import register
from cipo_jax.methods.fixed_target import FixedTarget
from cipo_jax.methods.objective import ConstrainedObjective, FixedTargetObjective, ForgetLoss
from cipo_jax.methods.retain import over_vocabulary
from cipo_jax.settings import setting
from cipo_jax.shared_config import RunConfig
from cipo_jax.training.objective import Batch, Metrics, StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class PduConfig:
    """PDU (arXiv 2506.05314): flat logits under a bound on the retain loss."""

    epsilon: float = setting(0.3, "bound on the retain loss, in nats a token", 0.0)
    dual_lr: float = setting(1.0, "step size of the dual variable", 0.0)


@dataclasses.dataclass(frozen=True)
class Flatness(ForgetLoss):
    """Variance of the next-token logits."""

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        del context
        rows = batch["forget"]
        values = over_vocabulary(policy, [params], rows, losses.flatness_per_token)
        loss = losses.token_mean(values, rows.mask, rows.num_tokens)
        return loss, {"forget/flatness": loss}


@dataclasses.dataclass(frozen=True)
class Pdu(FixedTarget):
    """Primal-dual unlearning (arXiv 2506.05314)."""

    def objective(self, config: RunConfig) -> ConstrainedObjective:
        plain: FixedTargetObjective = super().objective(config)
        settings = config.group(PduConfig)
        return ConstrainedObjective(
            plain.forget,
            plain.retain,
            plain.forget_weight,
            plain.retain_weight,
            settings.epsilon,
            settings.dual_lr,
        )


def _flatness(config: RunConfig) -> Flatness:
    del config
    return Flatness()


register(Pdu("pdu", "flat logits, the retain term as a constraint", "2506.05314", loss=_flatness))
