"""``unlearn``: CiPO, or another method, on one model, into one run folder."""

import sys
import time

from cipo_jax.commands.flags import parse_flags
from cipo_jax.config import Config
from cipo_jax.errors import EXIT_DIVERGED

HELP = """Makes the model forget, by --config.method, and writes the run folder: config.json, what
the method learns from (counterfactuals.jsonl, pairs.jsonl, ...), iterations/*, evals/*,
metrics.jsonl, tensorboard/, checkpoints/, export/ and summary.json. The same command goes on where
a stopped or killed run was."""


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    started = time.monotonic()
    config, flags = parse_flags(
        Config,
        "unlearn",
        argv,
        HELP,
        strings={"workdir": "the run folder, made if it is not there"},
        needs=("config", "workdir"),
    )
    from cipo_jax.progress import Reporter
    from cipo_jax.reports.summary import print_table, summarize
    from cipo_jax.training.loop import Diverged
    from cipo_jax.unlearning.engine import Engine
    from cipo_jax.unlearning.start import unlearn

    reporter = Reporter()
    engine = Engine.open(config, flags.workdir, reporter)
    engine.folder.listen()
    engine.folder.count_startup(time.monotonic() - started)
    try:
        result = unlearn(engine)
    except Diverged as error:
        print(f"cipo: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    finally:
        engine.log.close()
    summary = summarize(engine.folder, result)
    print_table(summary, engine.folder.path)
    return 0
