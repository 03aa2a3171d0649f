"""Objectives that the tests of the train step minimize."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cipo_jax import losses
from cipo_jax.config import CipoConfig
from cipo_jax.training.step import Objective


@dataclasses.dataclass(frozen=True)
class FunctionObjective(Objective):
    """(policy, params, batch) -> (loss, metrics) as an objective."""

    function: Callable

    def __call__(self, policy, params, batch, context):
        del context
        return self.function(policy, params, batch)


def nll(policy, params, sequences):
    logps = policy.completion_logps(params, sequences)
    return losses.nll(logps, sequences.mask, num_sequences=sequences.num_sequences)[0]


def retain_term(policy, params, batch):
    terms = {g: nll(policy, params, batch[g]) for g in ("retain", "reasoning") if g in batch}
    if not terms:
        return jnp.zeros(()), {}
    return jnp.stack(list(terms.values())).mean(), {f"nll/{g}": v for g, v in terms.items()}


@dataclasses.dataclass(frozen=True)
class Warmup(Objective):
    config: CipoConfig

    def __call__(self, policy, params, batch, context):
        chosen = nll(policy, params, batch["chosen"])
        retained, metrics = retain_term(policy, params, batch)
        loss = chosen + self.config.retain_weight * retained
        return loss, metrics | {"nll/chosen": chosen}


@dataclasses.dataclass(frozen=True)
class Preference(Objective):
    config: CipoConfig

    def __call__(self, policy, params, batch, context):
        config, pairs = self.config, batch["pairs"]
        flat = pairs.flattened()
        token_logps = policy.completion_logps(params, flat)
        sums = losses.sequence_logps(token_logps, flat.mask).reshape(-1, 2)
        loss, metrics = self._preference(sums, batch.get("ref"), pairs.lengths)
        first = pairs.side(0)
        chosen, _ = losses.nll(token_logps[0::2], first.mask, num_sequences=first.num_sequences)
        retained, retain_metrics = retain_term(policy, params, batch)
        total = loss + config.nll_weight * chosen + config.retain_weight * retained
        return total, metrics | retain_metrics | {"preference": loss, "nll/chosen": chosen}

    def _preference(self, logps, ref, lengths):
        config = self.config
        beta = config.beta or (2.0 if config.loss == "simpo" else 0.1)
        sides = logps[:, 0], logps[:, 1]
        lengths = lengths[:, 0], lengths[:, 1]
        if config.loss == "simpo":
            return losses.simpo(*sides, *lengths, beta=beta, gamma=config.gamma)
        ref = ref[:, 0], ref[:, 1]
        if config.loss == "ipo":
            return losses.ipo(*sides, *ref, *lengths, beta=beta)
        return losses.dpo(*sides, *ref, beta=beta)


def objective(kind, **changes):
    """CiPO's "warmup" or "preference" objective, with changes to its config."""
    return {"warmup": Warmup, "preference": Preference}[kind](CipoConfig(**changes))


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The optimizer's part of a training config."""

    lr: float = 1e-5
    warmup_steps: int = 4
    lr_schedule: str = "linear"
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    max_grad_norm: float = 1.0


def flattened(pairs):
    """[B, 2, ...] -> [2 B, ...], by hand."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs)
