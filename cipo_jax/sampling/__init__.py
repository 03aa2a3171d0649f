"""Sampling of long chains of thought: `Sampler`, its input and its output."""

from cipo_jax.sampling.job import Completion, Request, SamplingJob
from cipo_jax.sampling.params import SamplingParams
from cipo_jax.sampling.sampler import Sampler

__all__ = ["Completion", "Request", "Sampler", "SamplingJob", "SamplingParams"]
