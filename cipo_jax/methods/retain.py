"""Retain terms: losses that keep facts and reasoning while something else is forgotten.

A term acts on the groups batch["retain"] and batch["reasoning"], whichever there are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp

from cipo_jax import losses
from cipo_jax.data.batches import CompletionBatch
from cipo_jax.runs.data import RetainedExamples
from cipo_jax.training.objective import Batch, Metrics, StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params

GROUPS = RetainedExamples.GROUPS


@dataclasses.dataclass(frozen=True)
class RetainTerm:
    """Base class; an instance is a function of one update step.

    Attributes:
      uses_data: whether it acts on retained examples at all.
      needs_reference_params: whether it compares with the base parameters.
    """

    uses_data: ClassVar[bool] = True
    needs_reference_params: ClassVar[bool] = True

    def of_group(
        self, policy: Policy, params: Params, rows: CompletionBatch, context: StepContext
    ) -> Array:
        """The loss on one group of retained examples."""
        raise NotImplementedError

    def combined(self, terms: dict[str, Array]) -> Array:
        """The loss of all groups: their mean, so that facts and reasoning weigh the same."""
        return jnp.stack(list(terms.values())).mean()

    def metric(self, group: str) -> str:
        return f"retain/{group}"

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        """The loss, and that of each group."""
        terms = {
            group: self.of_group(policy, params, batch[group], context)
            for group in GROUPS
            if self.uses_data and group in batch
        }
        if not terms:
            return jnp.zeros(()), {}
        return self.combined(terms), {self.metric(g): value for g, value in terms.items()}


@dataclasses.dataclass(frozen=True)
class NoRetain(RetainTerm):
    """Nothing is retained."""

    uses_data: ClassVar[bool] = False
    needs_reference_params: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class NllRetain(RetainTerm):
    """Mean NLL of the retained completions."""

    needs_reference_params: ClassVar[bool] = False

    def of_group(
        self, policy: Policy, params: Params, rows: CompletionBatch, context: StepContext
    ) -> Array:
        del context
        return completion_nll(policy, params, rows)

    def metric(self, group: str) -> str:
        return f"nll/{group}"


@dataclasses.dataclass(frozen=True)
class KlRetain(RetainTerm):
    """KL(base || policy) of next-token distributions."""

    def per_token(self) -> Callable[..., Array]:
        """The loss of [n, V] logits of policy and reference, [n]."""
        return losses.kl_per_token

    def of_group(
        self, policy: Policy, params: Params, rows: CompletionBatch, context: StepContext
    ) -> Array:
        models = [params, context.reference]
        values = over_vocabulary(policy, models, rows, self.per_token())
        return losses.token_mean(values, rows.mask, rows.num_tokens)


@dataclasses.dataclass(frozen=True)
class KdRetain(KlRetain):
    """Distillation from the base parameters."""

    temperature: float = 1.0

    def per_token(self) -> Callable[..., Array]:
        return functools.partial(losses.kd_per_token, temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class HiddenRetain(RetainTerm):
    """Mean squared distance to the base parameters' hidden states at a layer (RMU, R2MU).

    Attributes:
      layer: whose output is compared, from 0.
      weights: of facts and of reasoning, which are added up.
    """

    layer: int = 0
    weights: tuple[float, float] = (1.0, 1.0)

    def of_group(
        self, policy: Policy, params: Params, rows: CompletionBatch, context: StepContext
    ) -> Array:
        states, frozen = (
            policy.layer_states(p, rows, self.layer) for p in (params, context.reference)
        )
        return losses.hidden_match(states, frozen, rows.mask, num_tokens=rows.num_tokens)[0]

    def combined(self, terms: dict[str, Array]) -> Array:
        weights = dict(zip(GROUPS, self.weights, strict=True))
        return jnp.stack([weights[g] * v for g, v in terms.items()]).sum()


# ---- shared by losses of all methods


def completion_nll(policy: Policy, params: Params, rows: CompletionBatch) -> Array:
    """Mean NLL of completions, which weigh the same, in nats a token."""
    logps = policy.completion_logps(params, rows)
    return losses.nll(logps, rows.mask, num_sequences=rows.num_sequences)[0]


def over_vocabulary(
    policy: Policy,
    models: list[Params],
    rows: CompletionBatch,
    function: Callable[..., Array],
    *per_token: Array,
) -> Array:
    """A function of next-token logits at each completion token, [B, C], a chunk at a time."""
    states = [(policy.completion_states(p, rows), policy.head(p)) for p in models]
    return losses.over_chunks(function, states, *per_token, chunk=policy.compute.logits_chunk)
