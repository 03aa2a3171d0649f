"""The gold standard: a model that was not trained on the forget set."""

import dataclasses
from typing import ClassVar

from cipo_jax.errors import UserError
from cipo_jax.methods.base import Method, register
from cipo_jax.runs.context import Run
from cipo_jax.runs.evaluation import Result, evaluate_retrained
from cipo_jax.runs.measurement import Measurement
from cipo_jax.shared_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Retrain(Method):
    """Trains nothing: config.model.retrained is measured."""

    trains: ClassVar[bool] = False

    def run(self, run: Run, measurement: Measurement) -> Result:
        """Raises UserError where config.model.retrained saw this forget set."""
        before = measurement.before(run)
        retrained = evaluate_retrained(run)
        if retrained is None:
            raise UserError(
                "config.method = 'retrain': config.model.retrained is no model that never saw this "
                "forget set; make one with `pretrain` (--config.forget.people=...)"
            )
        scores = before.scores if before else None
        return Result("retrain", scores, retrained.scores, retrained.scores, (), 0, None)

    def retains(self, config: RunConfig) -> bool:
        del config
        return False


register(Retrain("retrain", "the gold standard: a model that was not trained on the forget set"))
