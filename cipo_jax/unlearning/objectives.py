"""CiPO's two objectives and the terms they share with all methods: (policy, params, batch) -> loss.

A batch holds named groups. "chosen": counterfactuals. "pairs": chosen and rejected completions side
by side, every array [B, 2, ...]. "weights": [B] of the pairs. "ref": [B, 2] their log-probabilities
under the reference. "retain" and "reasoning": what is to be kept. Groups that a run has no data for
are left out.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from cipo_jax import losses
from cipo_jax.config import CipoConfig
from cipo_jax.training.step import Batch, Metrics, Objective, Policy
from cipo_jax.typing import Array, Params

RETAINED = ("retain", "reasoning")


def nll(policy: Policy, params: Params, sequences: Any) -> Array:
    """Mean NLL of completions."""
    logps = policy.completion_logps(params, sequences)
    return losses.nll(logps, sequences.mask)[0]


def retain_term(policy: Policy, params: Params, batch: Batch) -> tuple[Array, Metrics]:
    """Mean NLL over the groups to be retained; facts and reasoning weigh the same."""
    terms = {g: nll(policy, params, batch[g]) for g in RETAINED if g in batch}
    if not terms:
        return jnp.zeros(()), {}
    return jnp.stack(list(terms.values())).mean(), {f"nll/{g}": v for g, v in terms.items()}


# Cached, so that equal settings are one objective, and one compiled update.
@functools.cache
def warmup_objective(config: CipoConfig) -> Objective:
    """Supervised warm-up: NLL on the counterfactuals, and the retain term."""

    def objective(policy: Policy, params: Params, batch: Batch) -> tuple[Array, Metrics]:
        chosen = nll(policy, params, batch["chosen"])
        retained, metrics = retain_term(policy, params, batch)
        return chosen + config.retain_weight * retained, metrics | {"nll/chosen": chosen}

    return objective


@functools.cache
def preference_objective(config: CipoConfig) -> Objective:
    """Preference loss + nll_weight * NLL on chosen + retain_weight * retain term."""

    def objective(policy: Policy, params: Params, batch: Batch) -> tuple[Array, Metrics]:
        pairs = batch["pairs"]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs)
        token_logps = policy.completion_logps(params, flat)
        sums = losses.sequence_logps(token_logps, flat.mask).reshape(-1, 2)
        weights = batch.get("weights")
        loss, metrics = _preference(config, sums, batch.get("ref"), pairs.lengths, weights)
        chosen, _ = losses.nll(token_logps[0::2], flat.mask[0::2])
        retained, retain_metrics = retain_term(policy, params, batch)
        total = loss + config.nll_weight * chosen + config.retain_weight * retained
        return total, metrics | retain_metrics | {"preference": loss, "nll/chosen": chosen}

    return objective


def _preference(
    config: CipoConfig, logps: Array, ref: Array | None, lengths: Array, weights: Array | None
) -> tuple[Array, Metrics]:
    chosen, rejected = logps[:, 0], logps[:, 1]
    beta = config.beta or (2.0 if config.loss == "simpo" else 0.1)
    if config.loss == "simpo":
        return losses.simpo(
            chosen,
            rejected,
            lengths[:, 0],
            lengths[:, 1],
            beta=beta,
            gamma=config.gamma,
            label_smoothing=config.label_smoothing,
            weights=weights,
        )
    assert ref is not None
    if config.loss == "ipo":
        return losses.ipo(
            chosen,
            rejected,
            ref[:, 0],
            ref[:, 1],
            lengths[:, 0],
            lengths[:, 1],
            beta=beta,
            weights=weights,
        )
    return losses.dpo(
        chosen,
        rejected,
        ref[:, 0],
        ref[:, 1],
        beta=beta,
        label_smoothing=config.label_smoothing,
        weights=weights,
    )
