"""A method: one way to unlearn, known by its name."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, TypeVar

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import DecoderConfig
from cipo_jax.models.lora import Lora
from cipo_jax.models.trainable import Trainable
from cipo_jax.runs.context import Run
from cipo_jax.runs.evaluation import Result
from cipo_jax.runs.measurement import Measurement
from cipo_jax.settings import with_changes
from cipo_jax.shared_config import CounterfactualConfig, RunConfig

C = TypeVar("C", bound=RunConfig)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to unlearn.

    Attributes:
      name: as in config.method.
      about: one line.
      source: arXiv id of the paper.
      overrides: settings "group.key" that replace a default of the config.
      trains: false for the retrained model, which is only measured.
    """

    name: str
    about: str
    source: str = ""
    overrides: Mapping[str, object] = dataclasses.field(default_factory=dict)

    trains: ClassVar[bool] = True

    def run(self, run: Run, measurement: Measurement) -> Result:
        """The method, from the model before to what `measurement` makes of its iterations.

        Args:
          run: where its stages are kept.
          measurement: what is measured before and after.
        """
        raise NotImplementedError

    def configured(self, config: C) -> C:
        """The config with the method's overrides, where it holds the defaults."""
        plain = type(config)()
        changes = [
            (key, value)
            for key, value in self.overrides.items()
            if _setting(config, key) == _setting(plain, key)
        ]
        return with_changes(config, changes)

    def trainable(self, config: RunConfig, decoder: DecoderConfig) -> Trainable:
        """What a run trains: adapters, a subset of the parameters, or all of them (None).

        Raises:
          UserError: where the settings do not fit the model.
        """
        del decoder
        lora = Lora.from_config(config.lora)
        if lora is not None and config.lora.path and self.needs_reference_params(config):
            raise UserError(
                f"config.lora.path: {self.name} compares with the base parameters, which have to "
                "be those of fresh adapters; export the model with its adapters merged first"
            )
        return lora

    def needs_reference_params(self, config: RunConfig) -> bool:
        """Whether each update step needs the base parameters."""
        del config
        return False

    def retains(self, config: RunConfig) -> bool:
        """Whether it trains on retained examples."""
        raise NotImplementedError

    def trace_settings(self, config: RunConfig) -> CounterfactualConfig | None:
        """Settings of the traces that it samples from the model; None if it samples none."""
        del config
        return None


def _setting(config: RunConfig, key: str) -> object:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Makes a method known by its name."""
    METHODS[method.name] = method
    return method


def given(value: float | None, default: float) -> float:
    """A setting, or the method's own default where it is None."""
    return default if value is None else value
