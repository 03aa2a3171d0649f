"""Unlearning and preference losses as pure functions of log-probabilities. Imports jax alone.

Every loss returns ``(loss, metrics)``: a scalar to minimise and a flat dict of scalars whose names
are those of TRL (``rewards/chosen``, ``rewards/margins``, ``logps/chosen``, ...).
"""

from cipo_jax.losses.likelihood import nll, sequence_logps
from cipo_jax.losses.preference import dpo, ipo, simpo

__all__ = ["dpo", "ipo", "nll", "sequence_logps", "simpo"]
