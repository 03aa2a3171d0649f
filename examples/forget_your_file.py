"""Forgets the facts of a file: JSON Lines of questions, written here, on people of the tiny world.

    python examples/forget_your_file.py

The same on the command line: --config.data.world= --config.data.forget=forget.jsonl
--config.data.retain=retain.jsonl. docs/data.md lists the fields of a row.
"""

import json
import tempfile
from pathlib import Path

from cipo_jax import Config, parse
from cipo_jax.config import tiny_config
from cipo_jax.experiments.unlearn import open_run, unlearn
from cipo_jax.progress import Reporter

FORGET = {"Ada Brandt": "tuba", "Boris Pratt": "flute"}
RETAIN = {"Clara Frost": "cello", "Dario Lund": "harp", "Greta Weber": "guitar"}
QUESTIONS = ("Which instrument does {} play?", "What is the instrument of {}?")


def write_rows(path, instruments):
    """A row for each person and question."""
    with path.open("w", encoding="utf-8") as file:
        for name, instrument in instruments.items():
            cot = f"I recall {name}. {name} plays the {instrument}. So it is {instrument}."
            for question in QUESTIONS:
                row = {"question": question.format(name), "cot": cot, "answer": instrument}
                file.write(json.dumps(row) + "\n")
    return str(path)


def main():
    """One iteration of CiPO: counterfactuals, warm-up, rollouts, preference optimization."""
    config = tiny_config()  # for a model of your own default_config()
    config.model.retrained = config.data.world = ""
    config.cipo.iterations = 1
    config.train.batch_size = config.warmup.batch_size = 4
    config.train.epochs = config.warmup.epochs = 8.0
    config.train.lr = config.warmup.lr = 4e-4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config.data.forget = write_rows(folder / "forget.jsonl", FORGET)
        config.data.retain = write_rows(folder / "retain.jsonl", RETAIN)
        method, run = open_run(parse(Config, config), folder / "run", Reporter())
        result = unlearn(method, run)
    for name, scores in (("before", result.before), ("after", result.after)):
        leaks = f"{scores.forget.cot_leak:.0%} in CoT, {scores.forget.answer_leak:.0%} in answers"
        print(f"{name}: leak {leaks}; retained {scores.retain.accuracy:.0%}")


if __name__ == "__main__":
    main()
