"""cipo_jax: unlearning for reasoning models, in their chain of thought and in their answers.

The names below are imported when they are first used, so that ``import cipo_jax.losses`` needs jax
alone and ``--help`` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cipo_jax import losses
    from cipo_jax.config import Config, default_config, parse
    from cipo_jax.errors import UserError
    from cipo_jax.language_model import LanguageModel, TextPair
    from cipo_jax.methods.cipo.objective import PreferenceObjective
    from cipo_jax.models.lora import Lora
    from cipo_jax.sampling.job import Request, SamplingJob
    from cipo_jax.sampling.params import SamplingParams
    from cipo_jax.sampling.sampler import Sampler
    from cipo_jax.training.mesh import make_mesh
    from cipo_jax.training.objective import Objective
    from cipo_jax.training.optimizer import AdamW, Schedule
    from cipo_jax.training.step import TrainStep

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "Config",
    "LanguageModel",
    "Lora",
    "Objective",
    "PreferenceObjective",
    "Request",
    "Sampler",
    "SamplingJob",
    "SamplingParams",
    "Schedule",
    "TextPair",
    "TrainStep",
    "UserError",
    "default_config",
    "losses",
    "make_mesh",
    "parse",
]

_MODULES = {
    "AdamW": "training.optimizer",
    "Config": "config",
    "LanguageModel": "language_model",
    "Lora": "models.lora",
    "Objective": "training.objective",
    "PreferenceObjective": "methods.cipo.objective",
    "Request": "sampling.job",
    "Sampler": "sampling.sampler",
    "SamplingJob": "sampling.job",
    "SamplingParams": "sampling.params",
    "Schedule": "training.optimizer",
    "TextPair": "language_model",
    "TrainStep": "training.step",
    "UserError": "errors",
    "default_config": "config",
    "make_mesh": "training.mesh",
    "parse": "config",
}


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("cipo_jax.losses")
    if name not in _MODULES:
        raise AttributeError(f"module 'cipo_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cipo_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
