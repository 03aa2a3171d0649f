"""Unlearning and preference losses as pure functions of arrays. Imports jax alone.

- `preference`: pairs of completions
- `likelihood`: NLL
- `unlearning`: log-probabilities of the completions to forget
- `distribution`: next-token distributions, and `over_chunks`, with which [B, C, V] never exists
- `activation`: hidden states
- `token_mean`: the mean over tokens that these share

Every loss returns ``(loss, metrics)``: a scalar to minimize and a flat dict of scalars. Names of
preference metrics are those of TRL (``rewards/chosen``, ``rewards/margins``, ``logps/chosen``).
"""

from cipo_jax.losses._shared import token_mean
from cipo_jax.losses.activation import control_vector, hidden_match, r2mu, rmu_forget
from cipo_jax.losses.distribution import (
    ceu,
    ceu_per_token,
    flatness,
    flatness_per_token,
    kd,
    kd_per_token,
    kl,
    kl_per_token,
    over_chunks,
    undial,
    undial_per_token,
)
from cipo_jax.losses.likelihood import nll, sequence_logps
from cipo_jax.losses.preference import cpo, dpo, hinge, ipo, orpo, robust_dpo, simpo
from cipo_jax.losses.unlearning import (
    dual_ascent,
    ga,
    grad_diff,
    idk_dpo,
    npo,
    satimp,
    simnpo,
    tru,
    wga,
)

__all__ = [
    "ceu",
    "ceu_per_token",
    "control_vector",
    "cpo",
    "dpo",
    "dual_ascent",
    "flatness",
    "flatness_per_token",
    "ga",
    "grad_diff",
    "hidden_match",
    "hinge",
    "idk_dpo",
    "ipo",
    "kd",
    "kd_per_token",
    "kl",
    "kl_per_token",
    "nll",
    "npo",
    "orpo",
    "over_chunks",
    "r2mu",
    "rmu_forget",
    "robust_dpo",
    "satimp",
    "sequence_logps",
    "simnpo",
    "simpo",
    "token_mean",
    "tru",
    "undial",
    "undial_per_token",
    "wga",
]
