"""Scores of a model, without changing it."""

from cipo_jax.runs.context import Run
from cipo_jax.runs.evaluation import Evaluation, evaluate


def evaluate_base(run: Run) -> Evaluation:
    """The stage that evaluates config.model.path; also writes scores.json."""
    evaluation = run.stage("evals/model", evaluate, run.base, run.workspace.data.test)
    if not run.path("scores.json").exists():
        run.write_json("scores.json", evaluation.scores.to_row())
    return evaluation
