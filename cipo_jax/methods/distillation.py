"""Distributions are the target: undial, kd, ceu."""

import dataclasses
import functools
from typing import ClassVar

from cipo_jax import losses
from cipo_jax.methods.base import register
from cipo_jax.methods.fixed_target import FixedTarget, ImitateTarget
from cipo_jax.methods.objective import ForgetLoss
from cipo_jax.methods.retain import over_vocabulary
from cipo_jax.methods.targets import CounterfactualTargets
from cipo_jax.settings import setting
from cipo_jax.shared_config import RunConfig
from cipo_jax.training.objective import Batch, Metrics, StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """UNDIAL (arXiv 2402.10052); kd and ceu have no setting of their own."""

    beta: float = setting(10.0, "UNDIAL: amount by which the true token's logit is lowered", 0.0)


@dataclasses.dataclass(frozen=True)
class Undial(ForgetLoss):
    """Distillation from the base parameters with the true token's logit lowered by beta."""

    needs_reference_params: ClassVar[bool] = True

    beta: float = 10.0

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        rows = batch["forget"]
        per_token = functools.partial(losses.undial_per_token, beta=self.beta)
        models = [params, context.reference]
        values = over_vocabulary(policy, models, rows, per_token, rows.completions)
        loss = losses.token_mean(values, rows.mask, rows.num_tokens)
        return loss, {"forget/undial": loss}


@dataclasses.dataclass(frozen=True)
class Ceu(ForgetLoss):
    """Cross entropy to the policy's own distribution without the true token."""

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        del context
        rows = batch["forget"]
        values = over_vocabulary(policy, [params], rows, losses.ceu_per_token, rows.completions)
        loss = losses.token_mean(values, rows.mask, rows.num_tokens)
        return loss, {"forget/ceu": loss}


def _undial(config: RunConfig) -> Undial:
    return Undial(config.group(DistillationConfig).beta)


def _imitate(config: RunConfig) -> ImitateTarget:
    del config
    return ImitateTarget()


def _ceu(config: RunConfig) -> Ceu:
    del config
    return Ceu()


register(
    FixedTarget(
        "undial",
        "distillation from the base with the true token's logit lowered",
        "2402.10052",
        loss=_undial,
    )
)
register(
    FixedTarget(
        "kd",
        "counterfactuals imitated, distillation on retained examples",
        "1503.02531",
        loss=_imitate,
        targets=CounterfactualTargets(),
        retain="kd",
    )
)
register(
    FixedTarget("ceu", "cross entropy to itself without the true token", "2503.01224", loss=_ceu)
)
