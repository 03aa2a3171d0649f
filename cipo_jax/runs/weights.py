"""Weights as stage results: a name of a checkpoint, read when it is needed."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from cipo_jax.data.records import field
from cipo_jax.runs.results import StageResult
from cipo_jax.training.step import PhaseResult

BASE = "base"


@dataclasses.dataclass(frozen=True)
class Weights(StageResult):
    """Trained parameters of a run; the arrays are in its checkpoints."""

    schema: ClassVar[str] = "weights"

    name: str = field('the checkpoint, such as "warmup" or "iteration-01"; "base" before training')
    fingerprint: str = field("digest of what they were made from")
    steps: int = field("update steps of the run up to here")
    keeps_ema: bool = field("whether a moving average of the parameters is kept", False)
    aux_names: tuple[str, ...] = field("named numbers that go on with them", ())


class WeightCache:
    """The arrays of one `Weights` at a time."""

    def __init__(self, load: Callable[[Weights], PhaseResult]):
        """Holds nothing yet; `load` reads the arrays of weights."""
        self._load = load
        self._key, self._held = "", None

    def get(self, weights: Weights) -> PhaseResult:
        """The arrays of weights, which stay here until others are asked for."""
        if weights.fingerprint != self._key or self._held is None:
            self.clear()  # Free the old arrays before the new ones are allocated.
            self._held, self._key = self._load(weights), weights.fingerprint
        return self._held

    def take(self, weights: Weights) -> PhaseResult:
        """The arrays of weights, given up: the caller may donate them."""
        found = self.get(weights)
        self.clear()
        return found

    def put(self, weights: Weights, arrays: PhaseResult) -> None:
        """Holds arrays that were just computed."""
        self._held, self._key = arrays, weights.fingerprint

    def clear(self) -> None:
        self._key, self._held = "", None
