"""The run that belongs to a method."""

from cipo_jax.errors import UserError
from cipo_jax.unlearning import methods
from cipo_jax.unlearning.baseline import BaselineRun
from cipo_jax.unlearning.cipo import CipoRun
from cipo_jax.unlearning.engine import Engine
from cipo_jax.unlearning.materials import Materials
from cipo_jax.unlearning.run import Run
from cipo_jax.unlearning.run_folder import Row


def run_of(engine: Engine, materials: Materials | None = None) -> Run:
    """The stages of `config.method`.

    Args:
      engine: of the run.
      materials: what several runs share; its own by default.
    """
    iterative = methods.find(engine.config.method).loop == "iterative"
    return (CipoRun if iterative else BaselineRun)(engine, materials)


def unlearn(engine: Engine) -> Row:
    """Unlearns by `config.method`, or goes on with it; returns what it came to.

    It reads like this for every method: evaluate, rounds of optimization and validation, evaluate
    the best of them. See `Run.conclude` for what it returns.

    Raises:
      UserError: for "retrain", where no model never saw this forget set.
    """
    run = run_of(engine)
    before = run.evaluate("before", "start")
    if methods.find(engine.config.method).loop != "none":
        return run.conclude(before, run.rounds())
    retrained = run.evaluate_retrained()
    if retrained is None:
        raise UserError(
            "config.method = 'retrain': config.model.retrained is no model that never saw this "
            "forget set; make one with `pretrain` (--config.forget.people=...)"
        )
    return {
        "method": engine.config.method,
        "before": before,
        "after": retrained,
        "retrained": retrained,
        "iterations": [],
        "best": 0,
        "fluency": None,
    }
