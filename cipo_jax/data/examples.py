"""`Example`: the schema of data files."""

import dataclasses

from cipo_jax.data.records import field


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with its answers and the facts that must not leak."""

    question: str = field("the question")
    answer: str = field("the true answer")
    cot: str | None = field("chain of thought that leads to the answer", None)
    target_answer: str | None = field("counterfactual answer chosen by the user", None)
    aliases: tuple[str, ...] = field("other spellings of the answer", ())
    facts: tuple[str, ...] = field(
        "further strings that count as leaks, such as the bridge of a two-hop question", ()
    )
    kind: str = field("free label by which scores can be broken down", "")
    group: str = field(
        "questions of one group ask for the same fact and get the same target answer", ""
    )
    paraphrased_question: str | None = field("the question in other words", None)
    paraphrased_answer: str | None = field("the answer in other words, as in TOFU", None)
    perturbed_answers: tuple[str, ...] = field("wrong answers to compare with, as in TOFU", ())

    @property
    def forbidden(self) -> tuple[str, ...]:
        """The strings that count as leaks: the answer, its aliases and further facts."""
        return tuple(dict.fromkeys((self.answer, *self.aliases, *self.facts)))


def example_row(example: Example) -> dict[str, object]:
    """The JSON object of an example, without the fields that are at their default."""
    defaults = {f.name: f.default for f in dataclasses.fields(Example)}
    row = {name: getattr(example, name) for name in defaults}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in row.items()
        if value != defaults[name]
    }
