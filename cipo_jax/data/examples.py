"""Examples, and JSON Lines out. The schema of our own data files is `Example`.

`question` and `answer` are required; `cot` is the chain of thought that leads to the answer,
`target_answer` what the user wants to hear instead, `aliases` other spellings of the answer,
`facts` further strings that must not surface either (a bridge of a two-hop question, say), and
`kind` a free label by which scores are broken down. Questions that share a `group` ask for the same
fact and are given the same target answer. `paraphrased_question` and `paraphrased_answer` say the
same in other words, `perturbed_answers` are wrong answers to compare with, as in TOFU.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with what is known about it."""

    question: str
    answer: str
    cot: str | None = None
    target_answer: str | None = None
    aliases: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    kind: str = ""
    group: str = ""
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()

    @property
    def forbidden(self) -> tuple[str, ...]:
        """Every string whose appearance is a leak: the answer, its aliases and further facts."""
        return tuple(dict.fromkeys((self.answer, *self.aliases, *self.facts)))


def example_row(example: Example) -> dict[str, Any]:
    """The JSON object of an example: fields at their default are left out."""
    defaults = {f.name: f.default for f in dataclasses.fields(Example)}
    row = {k: v for k, v in dataclasses.asdict(example).items() if v != defaults[k]}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in row.items()}
