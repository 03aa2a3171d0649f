"""DPO on fixed pairs, towards a target: idk_dpo, altpo."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from cipo_jax import losses
from cipo_jax.data.batches import TokenizedExample
from cipo_jax.methods.base import register
from cipo_jax.methods.fixed_target import FixedTarget
from cipo_jax.methods.objective import ForgetLoss, sequence_logps
from cipo_jax.methods.refusal import IdkTargets
from cipo_jax.methods.targets import Target, TargetBuilder, trace_targets
from cipo_jax.runs.context import Run
from cipo_jax.settings import setting
from cipo_jax.shared_config import CounterfactualConfig, RunConfig
from cipo_jax.training.objective import Batch, Metrics, StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """IDK-DPO (arXiv 2401.06121) and AltPO (arXiv 2409.13474)."""

    beta: float = setting(0.1, "DPO's beta", above=0.0)
    num_alternates: int = setting(5, "AltPO: alternate answers to each forget question", 1)


@dataclasses.dataclass(frozen=True)
class TargetDpo(ForgetLoss):
    """DPO with the target as chosen and the forget completion as rejected.

    Attributes:
      beta: strength of the pull towards the reference, > 0.
    """

    needs_reference_logps: ClassVar[bool] = True

    beta: float = 0.1

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        del context
        return losses.idk_dpo(
            sequence_logps(policy, params, batch["target"]),
            sequence_logps(policy, params, batch["forget"]),
            batch["ref_target"],
            batch["ref_forget"],
            beta=self.beta,
        )


def _target_dpo(config: RunConfig) -> TargetDpo:
    return TargetDpo(config.group(PreferenceConfig).beta)


@dataclasses.dataclass(frozen=True)
class AlternateTargets(TargetBuilder):
    """Several other answers to each question, with traces."""

    def build(self, run: Run, originals: Sequence[TokenizedExample]) -> tuple[Target, ...]:
        del originals
        count = run.config.group(PreferenceConfig).num_alternates
        names = [f"alternates-{i}" for i in range(1, count + 1)]
        drawn = [trace_targets(run, name, run.config.counterfactual) for name in names]
        # Those of a question stand together.
        return tuple(sorted((t for found in drawn for t in found), key=lambda t: t.item))

    def trace_settings(self, config: RunConfig) -> CounterfactualConfig | None:
        return config.counterfactual


register(
    FixedTarget("idk_dpo", "DPO towards IDK", "2401.06121", loss=_target_dpo, targets=IdkTargets())
)
register(
    FixedTarget(
        "altpo",
        "DPO towards several other answers",
        "2409.13474",
        loss=_target_dpo,
        targets=AlternateTargets(),
    )
)
