"""``unlearn``: CiPO, or another method, on one model, into one run folder."""

import time
from typing import TYPE_CHECKING

from cipo_jax.commands.flags import run_with_folder

if TYPE_CHECKING:
    from cipo_jax.config import Config

HELP = """Makes the model forget, by --config.method, and writes the run folder: config.json, what
the method learns from (counterfactuals.jsonl, pairs.jsonl, ...), iterations/*, evals/*,
metrics.jsonl, tensorboard/, checkpoints/, export/ and summary.json. The same command goes on where
a stopped or killed run was."""


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    started = time.monotonic()

    def work(config: "Config", workdir: str) -> None:
        from cipo_jax.experiments.unlearn import open_run, unlearn
        from cipo_jax.progress import Reporter
        from cipo_jax.reports.summary import print_table, summarize

        method, run = open_run(config, workdir, Reporter())
        run.preemption.install_signal_handlers()
        run.ledger.count_startup(time.monotonic() - started)
        try:
            result = unlearn(method, run)
        finally:
            run.metrics.close()
        print_table(summarize(run, result), run.folder)

    return run_with_folder("unlearn", argv, HELP, work)
