"""Objectives: the losses of training as values, and what they take."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params

Metrics = dict[str, Array]
Batch = Mapping[str, Any]  # Named groups of `data.batches.CompletionBatch`, and per-row arrays.
AuxState = dict[str, Array]  # Named numbers that go from step to step.


class StepContext(NamedTuple):
    """Inputs of an objective besides parameters and batch.

    Attributes:
      reference: base parameters in the compute dtype, without gradient; None unless the objective
        needs them.
      aux_state: the objective's named numbers; {} where it keeps none.
    """

    reference: Params = None
    aux_state: Mapping[str, Array] = {}


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base class of what a step minimizes: a frozen dataclass whose fields are its settings.

    Equal objectives share a compiled update. Subclasses define `__call__`, and the other methods
    where they need a reference or numbers that go from step to step, such as a dual variable.
    """

    @property
    def needs_reference_params(self) -> bool:
        """Whether `StepContext.reference` is needed."""
        return False

    def initial_aux_state(self) -> dict[str, float]:
        """The named numbers before the first step."""
        return {}

    def update_aux_state(self, aux_state: AuxState, metrics: Metrics) -> AuxState:
        """The named numbers after a step, from those before it and the step's metrics; pure."""
        del metrics
        return aux_state

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        """The loss, a mean over rows or tokens, and a flat dict of scalars.

        Means over tokens divide by `CompletionBatch.num_tokens` where it is set, means over
        sequences by `num_sequences`.
        """
        raise NotImplementedError
