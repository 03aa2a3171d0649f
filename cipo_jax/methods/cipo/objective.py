"""CiPO's two objectives: supervised warm-up, and preference with NLL and retain term.

A batch holds named groups. "chosen": counterfactuals. "pairs": chosen and rejected completions side
by side, every array [B, 2, ...]; "weights" [B] of the pairs; "ref" [B, 2] their log-probabilities
under the reference. "retain" and "reasoning": what is retained. Groups without data are left out.
"""

import dataclasses
from typing import Literal

from cipo_jax import losses
from cipo_jax.methods.base import given
from cipo_jax.methods.cipo.config import CipoConfig
from cipo_jax.methods.retain import NllRetain, completion_nll
from cipo_jax.training.objective import Batch, Metrics, Objective, StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class WarmupObjective(Objective):
    """NLL on the counterfactuals + retain_weight * the retain term."""

    retain_weight: float = 1.0

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        chosen = completion_nll(policy, params, batch["chosen"])
        retained, metrics = NllRetain()(policy, params, batch, context)
        return chosen + self.retain_weight * retained, metrics | {"nll/chosen": chosen}


@dataclasses.dataclass(frozen=True)
class PreferenceObjective(Objective):
    """Preference loss + nll_weight * NLL on chosen + retain_weight * the retain term.

    Attributes:
      loss: the preference loss.
      beta: its scale.
      gamma: SimPO's target margin.
      label_smoothing: of DPO and SimPO.
      nll_weight: of the NLL on chosen completions.
      retain_weight: of the retain term.
    """

    loss: Literal["dpo", "ipo", "simpo"] = "dpo"
    beta: float = 0.1
    gamma: float = 0.5
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    retain_weight: float = 0.0

    @classmethod
    def from_config(cls, config: CipoConfig) -> "PreferenceObjective":
        """The objective of config.cipo."""
        return cls(
            config.loss,
            given(config.beta, 2.0 if config.loss == "simpo" else 0.1),
            config.gamma,
            config.label_smoothing,
            config.nll_weight,
            config.retain_weight,
        )

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        pairs = batch["pairs"]
        flat = pairs.flattened()
        token_logps = policy.completion_logps(params, flat)
        sums = losses.sequence_logps(token_logps, flat.mask).reshape(-1, 2)
        loss, metrics = self._preference(
            sums, batch.get("ref"), pairs.lengths, batch.get("weights")
        )
        chosen, _ = losses.nll(
            token_logps[0::2], flat.mask[0::2], num_sequences=pairs.side(0).num_sequences
        )
        retained, retain_metrics = NllRetain()(policy, params, batch, context)
        total = loss + self.nll_weight * chosen + self.retain_weight * retained
        return total, metrics | retain_metrics | {"preference": loss, "nll/chosen": chosen}

    def _preference(
        self, logps: Array, ref: Array | None, lengths: Array, weights: Array | None
    ) -> tuple[Array, Metrics]:
        chosen, rejected = logps[:, 0], logps[:, 1]
        if self.loss == "simpo":
            return losses.simpo(
                chosen,
                rejected,
                lengths[:, 0],
                lengths[:, 1],
                beta=self.beta,
                gamma=self.gamma,
                label_smoothing=self.label_smoothing,
                weights=weights,
            )
        assert ref is not None
        if self.loss == "ipo":
            return losses.ipo(
                chosen,
                rejected,
                ref[:, 0],
                ref[:, 1],
                lengths[:, 0],
                lengths[:, 1],
                beta=self.beta,
                weights=weights,
            )
        return losses.dpo(
            chosen,
            rejected,
            ref[:, 0],
            ref[:, 1],
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            weights=weights,
        )
