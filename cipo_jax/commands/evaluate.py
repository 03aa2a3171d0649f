"""``evaluate``: leak, retain and reasoning scores of a model, without changing it."""

import time
from typing import TYPE_CHECKING

from cipo_jax.commands.flags import run_with_folder

if TYPE_CHECKING:
    from cipo_jax.config import Config

HELP = """Evaluates --config.model.path on the evaluation splits of the config; writes
evals/model.jsonl (one row per question) and scores.json into the run folder."""


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    started = time.monotonic()

    def work(config: "Config", workdir: str) -> None:
        from cipo_jax.experiments.evaluate import evaluate_base
        from cipo_jax.experiments.unlearn import open_run
        from cipo_jax.progress import Reporter
        from cipo_jax.reports.summary import print_scores

        _, run = open_run(config, workdir, Reporter())
        run.preemption.install_signal_handlers()
        run.ledger.count_startup(time.monotonic() - started)
        evaluation = evaluate_base(run)
        print_scores(f"Scores of {config.model.path}", {"model": evaluation.scores})
        print(f"  {run.folder / 'evals' / 'model.jsonl'}")

    return run_with_folder("evaluate", argv, HELP, work)
