"""The objective of methods that are a loss: forget_weight * forget + retain_weight * retain."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from cipo_jax import losses
from cipo_jax.data.batches import CompletionBatch
from cipo_jax.methods.retain import RetainTerm
from cipo_jax.training.objective import Batch, Metrics, Objective, StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class ForgetLoss:
    """Base class of forget losses; an instance is a function of one update step.

    batch["forget"] holds the forget completions; batch["target"] the targets, row by row beside
    them; batch["ref_forget"] and batch["ref_target"] [B] the log-probabilities of both under the
    base parameters, in nats.

    Attributes:
      needs_reference_logps: whether it asks for ref_forget and ref_target.
      needs_reference_params: whether it asks for `StepContext.reference`.
    """

    needs_reference_logps: ClassVar[bool] = False
    needs_reference_params: ClassVar[bool] = False

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        """The loss and its metrics."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class FixedTargetObjective(Objective):
    """A forget loss and a retain term, weighted.

    Attributes:
      forget: the forget loss.
      retain: the retain term.
      forget_weight: of the first.
      retain_weight: of the second.
    """

    forget: ForgetLoss
    retain: RetainTerm
    forget_weight: float = 1.0
    retain_weight: float = 1.0

    @property
    def needs_reference_params(self) -> bool:
        return self.forget.needs_reference_params or self.retain.needs_reference_params

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        forget, metrics = self.forget(policy, params, batch, context)
        retained, retain_metrics = self.retain(policy, params, batch, context)
        weight, more = self.weight_of_retained(context)
        metrics = metrics | retain_metrics | {"forget": forget, "retained": retained} | more
        return self.forget_weight * forget + weight * retained, metrics

    def weight_of_retained(self, context: StepContext) -> tuple[float | Array, Metrics]:
        """The weight of the retain term in this step, and metrics of it."""
        del context
        return self.retain_weight, {}


@dataclasses.dataclass(frozen=True)
class ConstrainedObjective(FixedTargetObjective):
    """The retain term as a constraint: its weight is a dual variable (PDU, arXiv 2506.05314).

    Attributes:
      epsilon: upper bound of the retain term.
      dual_lr: step of the dual ascent.
    """

    epsilon: float = 0.3
    dual_lr: float = 1.0

    def initial_aux_state(self) -> dict[str, float]:
        return {"dual": self.retain_weight}

    def weight_of_retained(self, context: StepContext) -> tuple[float | Array, Metrics]:
        dual = jnp.asarray(context.aux_state["dual"])
        return dual, {"dual": dual}

    def update_aux_state(self, aux_state: dict[str, Array], metrics: Metrics) -> dict[str, Array]:
        dual, retained = aux_state["dual"], metrics["retained"]
        return {"dual": losses.dual_ascent(dual, retained, epsilon=self.epsilon, lr=self.dual_lr)}


def sequence_logps(policy: Policy, params: Params, rows: CompletionBatch) -> Array:
    """[B] log-probability of each completion, in nats."""
    return losses.sequence_logps(policy.completion_logps(params, rows), rows.mask)
