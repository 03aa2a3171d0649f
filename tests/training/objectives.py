"""Objectives that the tests of the train step minimize."""

import dataclasses
from collections.abc import Callable

import jax

from cipo_jax.config import CipoConfig
from cipo_jax.methods.cipo.objective import PreferenceObjective, WarmupObjective
from cipo_jax.shared_config import TrainConfig as TrainSettings
from cipo_jax.training.objective import Objective

__all__ = ["FunctionObjective", "TrainSettings", "flattened", "objective"]


@dataclasses.dataclass(frozen=True)
class FunctionObjective(Objective):
    """(policy, params, batch) -> (loss, metrics) as an objective."""

    function: Callable

    def __call__(self, policy, params, batch, context):
        del context
        return self.function(policy, params, batch)


def objective(kind, **changes):
    """CiPO's "warmup" or "preference" objective, with changes to its config."""
    config = CipoConfig(**changes)
    if kind == "warmup":
        return WarmupObjective(config.retain_weight)
    return PreferenceObjective.from_config(config)


def flattened(pairs):
    """[B, 2, ...] -> [2 B, ...], by hand."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs)
