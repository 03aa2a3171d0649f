"""Gradient ascent on forget completions, weighted or not: ga, grad_diff, kl, wga, satimp."""

import dataclasses

from cipo_jax import losses
from cipo_jax.methods.base import given, register
from cipo_jax.methods.fixed_target import FixedTarget
from cipo_jax.methods.objective import ForgetLoss
from cipo_jax.settings import setting
from cipo_jax.shared_config import RunConfig
from cipo_jax.training.objective import Batch, Metrics, StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class GradientAscentConfig:
    """Weights of WGA (arXiv 2502.19301) and SatImp (arXiv 2505.11953)."""

    beta: float | None = setting(
        None, "power of p in the weight of a token; None for WGA's 1 or SatImp's 5", 0.0
    )
    importance: float = setting(1.0, "SatImp: power of 1 - p in the weight of a token", 0.0)


@dataclasses.dataclass(frozen=True)
class GradientAscent(ForgetLoss):
    """Negated NLL of the forget completions."""

    def of_logps(
        self, logps: Array, mask: Array, num_tokens: Array | None
    ) -> tuple[Array, Metrics]:
        """The loss of token log-probabilities [B, C] under a mask."""
        return losses.ga(logps, mask, num_tokens=num_tokens)

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        del context
        rows = batch["forget"]
        return self.of_logps(policy.completion_logps(params, rows), rows.mask, rows.num_tokens)


@dataclasses.dataclass(frozen=True)
class WeightedGradientAscent(GradientAscent):
    """Tokens are weighted by p^beta."""

    beta: float = 1.0

    def of_logps(
        self, logps: Array, mask: Array, num_tokens: Array | None
    ) -> tuple[Array, Metrics]:
        return losses.wga(logps, mask, beta=self.beta, num_tokens=num_tokens)


@dataclasses.dataclass(frozen=True)
class SatImp(GradientAscent):
    """Tokens are weighted by p^beta (1 - p)^importance."""

    beta: float = 5.0
    importance: float = 1.0

    def of_logps(
        self, logps: Array, mask: Array, num_tokens: Array | None
    ) -> tuple[Array, Metrics]:
        return losses.satimp(
            logps, mask, beta1=self.beta, beta2=self.importance, num_tokens=num_tokens
        )


def _ga(config: RunConfig) -> GradientAscent:
    del config
    return GradientAscent()


def _wga(config: RunConfig) -> WeightedGradientAscent:
    return WeightedGradientAscent(given(config.group(GradientAscentConfig).beta, 1.0))


def _satimp(config: RunConfig) -> SatImp:
    settings = config.group(GradientAscentConfig)
    return SatImp(given(settings.beta, 5.0), settings.importance)


register(FixedTarget("ga", "gradient ascent", "2210.01504", loss=_ga, retain="none"))
register(
    FixedTarget("grad_diff", "gradient ascent, NLL on retained examples", "2203.12817", loss=_ga)
)
register(
    FixedTarget(
        "kl",
        "gradient ascent, KL to the base on retained examples",
        "2401.06121",
        loss=_ga,
        retain="kl",
    )
)
register(FixedTarget("wga", "gradient ascent weighted by p", "2502.19301", loss=_wga))
register(FixedTarget("satimp", "saturation and importance weights", "2505.11953", loss=_satimp))
