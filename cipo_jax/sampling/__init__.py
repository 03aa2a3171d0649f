"""Sampling of long chains of thought: `Sampler`, and what it takes and gives."""

from cipo_jax.sampling.decode import SamplingParams
from cipo_jax.sampling.sampler import Completion, Request, Sampler, rules_of

__all__ = ["Completion", "Request", "Sampler", "SamplingParams", "rules_of"]
