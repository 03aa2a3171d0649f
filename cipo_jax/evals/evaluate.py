"""Evaluation of a model: greedy generations to questions, each graded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from cipo_jax.data.examples import Example
from cipo_jax.data.splits import Role
from cipo_jax.evals.attacks import prefill_text
from cipo_jax.evals.leakage import GradedGeneration, grade
from cipo_jax.sampling.job import Request, SamplingJob
from cipo_jax.sampling.params import SamplingParams
from cipo_jax.sampling.sampler import Sampler
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.typing import Params


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


def graded(
    sampler: Sampler,
    chat_format: ChatFormat,
    params: Params,
    questions: Sequence[Question],
    max_new_tokens: int,
    prefill: str = "",
) -> Iterator[tuple[int, GradedGeneration]]:
    """Generates to questions greedily and grades each generation as soon as it ends.

    Args:
      sampler: of the model.
      chat_format: of the model.
      params: decoding layout.
      questions: from `encode_questions`.
      max_new_tokens: the length at which a generation is cut; it is graded as it stands.
      prefill: how completions begin; see `evals.attacks`.

    Yields:
      (index of the question, its graded generation), in the order in which generations end.
    """
    sampling_params = SamplingParams.for_chat(chat_format, max_new_tokens)
    given = chat_format.text_ids(prefill_text(prefill, chat_format.close)) if prefill else []
    requests = [Request(q.prompt_ids, i, prefill=given) for i, q in enumerate(questions)]
    # Greedy decoding draws no random numbers: any key will do.
    for completion in sampler.stream(params, SamplingJob(requests, sampling_params)):
        question = questions[completion.item]
        thought = chat_format.split([*given, *completion.ids])
        yield completion.item, grade(question.example, thought, question.split, completion.ids)
