"""Questions of an evaluation, each encoded once."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cipo_jax.data.examples import Example
from cipo_jax.data.splits import Role
from cipo_jax.text.chat_format import ChatFormat


class Question(NamedTuple):
    """A question to evaluate on, encoded.

    Attributes:
      split: the split that it belongs to.
      example: the question with its answers.
      prompt_ids: the ids of its prompt.
    """

    split: Role
    example: Example
    prompt_ids: Sequence[int]


def encode_questions(
    chat_format: ChatFormat, splits: Mapping[Role, Iterable[Example]]
) -> tuple[Question, ...]:
    """The questions of all splits, in order, with their prompt ids."""
    return tuple(
        Question(split, example, chat_format.prompt_ids(example.question))
        for split, examples in splits.items()
        for example in examples
    )
