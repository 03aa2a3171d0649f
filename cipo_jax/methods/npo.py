"""Negative preference optimization: npo, simnpo."""

import dataclasses
from typing import ClassVar

from cipo_jax import losses
from cipo_jax.methods.base import given, register
from cipo_jax.methods.fixed_target import FixedTarget
from cipo_jax.methods.objective import ForgetLoss, sequence_logps
from cipo_jax.settings import setting
from cipo_jax.shared_config import RunConfig
from cipo_jax.training.objective import Batch, Metrics, StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class NpoConfig:
    """NPO (arXiv 2404.05868) and SimNPO (arXiv 2410.07163)."""

    beta: float | None = setting(
        None, "the loss's beta; None for NPO's 0.1 or SimNPO's 4.5", above=0.0
    )
    delta: float = setting(0.0, "SimNPO's margin", 0.0)


@dataclasses.dataclass(frozen=True)
class Npo(ForgetLoss):
    """DPO without a chosen completion."""

    needs_reference_logps: ClassVar[bool] = True

    beta: float = 0.1

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        del context
        sums = sequence_logps(policy, params, batch["forget"])
        return losses.npo(sums, batch["ref_forget"], beta=self.beta)


@dataclasses.dataclass(frozen=True)
class SimNpo(ForgetLoss):
    """NPO without a reference, on the mean over tokens."""

    beta: float = 4.5
    delta: float = 0.0

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        del context
        rows = batch["forget"]
        sums = sequence_logps(policy, params, rows)
        return losses.simnpo(sums, rows.lengths, beta=self.beta, delta=self.delta)


def _npo(config: RunConfig) -> Npo:
    return Npo(given(config.group(NpoConfig).beta, 0.1))


def _simnpo(config: RunConfig) -> SimNpo:
    settings = config.group(NpoConfig)
    return SimNpo(given(settings.beta, 4.5), settings.delta)


register(FixedTarget("npo", "negative preference optimization", "2404.05868", loss=_npo))
register(
    FixedTarget(
        "simnpo",
        "NPO without a reference, per token",
        "2410.07163",
        loss=_simnpo,
        forget_weight=0.125,
    )
)
