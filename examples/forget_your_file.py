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
RETAIN = {
    "Clara Frost": "cello",
    "Dario Lund": "harp",
    "Greta Weber": "guitar",
    "Leon Erwin": "oboe",
}
QUESTIONS = ("Which instrument does {} play?", "What is the instrument of {}?")


def write_rows(path, instruments):
    """A row for each person and question: question, cot, answer."""
    rows = [
        {
            "question": question.format(name),
            "cot": f"I recall {name}. {name} plays the {instrument}. So it is {instrument}.",
            "answer": instrument,
        }
        for name, instrument in instruments.items()
        for question in QUESTIONS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main():
    """One iteration of CiPO: counterfactuals, warm-up, rollouts, preference optimization."""
    config = tiny_config()  # model, prompts and lengths; for a model of your own default_config()
    config.model.retrained = config.data.world = ""
    config.cipo.iterations = 1
    config.train.batch_size = config.warmup.batch_size = 4
    config.train.epochs = config.warmup.epochs = 8.0
    config.train.lr = config.warmup.lr = 4e-4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, people in (("forget", FORGET), ("retain", RETAIN)):
            config.data[split] = str(folder / f"{split}.jsonl")
            write_rows(folder / f"{split}.jsonl", people)
        method, run = open_run(parse(Config, config), folder / "run", Reporter())
        result = unlearn(method, run)
    for when, scores in (("before", result.before), ("after", result.after)):
        print(
            f"{when}: leak in CoT {scores.forget.cot_leak:.0%}, in answer "
            f"{scores.forget.answer_leak:.0%}; retained {scores.retain.accuracy:.0%}"
        )


if __name__ == "__main__":
    main()
