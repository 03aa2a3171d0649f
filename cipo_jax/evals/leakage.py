"""What a generation gives away, and whether it is right: pure functions on text.

A leak is any forbidden fact or alias anywhere in a text, matched on normalized whole words (see
`text.matching.reveals`, also for answers that are whole sentences). A generation that never closes its think block has no answer: its text counts as chain of thought, it is wrong, and it
lowers think-completion, so that silence by breakdown never looks like forgetting.
"""

from collections.abc import Collection, Sequence
from typing import Any

from cipo_jax.data.examples import Example
from cipo_jax.text.chat_format import Thought
from cipo_jax.text.matching import normalized_words, reveals

Row = dict[str, Any]


def judge(example: Example, thought: Thought, split: str) -> Row:
    """One row of an evaluation: the generation, what leaked where, and whether it is correct."""
    asked = example.question
    return {
        "split": split,
        "kind": example.kind,
        "question": example.question,
        "gold": example.answer,
        "cot": thought.cot,
        "answer": thought.answer,
        "closed": thought.closed,
        "cot_leaks": [f for f in example.forbidden if reveals(thought.cot, f, asked)],
        "answer_leaks": [f for f in example.forbidden if reveals(thought.answer, f, asked)],
        "correct": thought.closed
        and any(reveals(thought.answer, a, asked) for a in (example.answer, *example.aliases)),
    }


def share(flags: Sequence[bool]) -> float:
    """Share of true flags; 0 for none at all."""
    return sum(flags) / len(flags) if flags else 0.0


def word_validity(rows: Sequence[Row], words: Collection[str]) -> float:
    """Share of the generated words that are words of the world; numbers are."""
    generated = [w for r in rows for w in normalized_words(f"{r['cot']} {r['answer']}")]
    return share([w in words or w.isdigit() for w in generated])


def forget_scores(rows: Sequence[Row], words: Collection[str]) -> dict[str, float]:
    """Leak rates and fluency on the forget set, all in 0..1.

    Args:
      rows: from `judge`.
      words: the words of the world, normalized.

    Returns:
      cot_leak and answer_leak (share of rows with any leak there, down is better),
      think_completion and word_validity (up is better), and n.
    """
    return {
        "cot_leak": share([bool(r["cot_leaks"]) for r in rows]),
        "answer_leak": share([bool(r["answer_leaks"]) for r in rows]),
        "think_completion": share([r["closed"] for r in rows]),
        "word_validity": word_validity(rows, words),
        "n": len(rows),
    }


def accuracy_scores(rows: Sequence[Row]) -> dict[str, float]:
    """Share of rows whose answer, after a closed think block, names the gold answer; and n."""
    return {"accuracy": share([r["correct"] for r in rows]), "n": len(rows)}
