"""``evaluate``: leak, retain and reasoning scores of a model, without changing it."""

import time

from cipo_jax.commands.flags import parse_flags
from cipo_jax.config import Config

HELP = """Evaluates --config.model.path on the evaluation splits of the config; writes
evals/model.jsonl (one row per question) and scores.json into the run folder."""


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    started = time.monotonic()
    config, flags = parse_flags(
        Config,
        "evaluate",
        argv,
        HELP,
        strings={"workdir": "the run folder, made if it is not there"},
        needs=("config", "workdir"),
    )
    from cipo_jax.progress import Reporter
    from cipo_jax.reports.summary import print_scores
    from cipo_jax.unlearning.engine import Engine

    engine = Engine.open(config, flags.workdir, Reporter())
    engine.folder.listen()
    engine.folder.count_startup(time.monotonic() - started)

    def make() -> dict:
        splits = engine.splits
        rows, scores = engine.evaluate(
            "model", "evaluation", engine.assemble(engine.start()), splits.for_evaluation()
        )
        engine.folder.write_rows("evals/model.jsonl", rows)
        engine.folder.write_json("scores.json", scores)
        return scores

    scores = engine.folder.once("model", make, ["evals/model.jsonl", "scores.json"])
    print_scores(f"Scores of {config.model.path}", {"model": scores})
    print(f"  {engine.folder.path / 'evals' / 'model.jsonl'}")
    return 0
