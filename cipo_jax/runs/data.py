"""The data of a run, encoded once: questions with their prompt ids, and retained examples."""

import dataclasses
from functools import cached_property
from typing import ClassVar, Self

from cipo_jax.data.batches import TokenizedExample
from cipo_jax.data.examples import Example
from cipo_jax.data.splits import Splits
from cipo_jax.errors import UserError
from cipo_jax.evals.evaluate import Question, encode_questions
from cipo_jax.runs.identity import fingerprint
from cipo_jax.shared_config import DataConfig
from cipo_jax.text.chat_format import ChatFormat


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Questions to evaluate on.

    Attributes:
      questions: of any splits, encoded.
      words: the words that count as valid in generations, normalized.
    """

    questions: tuple[Question, ...]
    words: frozenset[str]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([self.questions, self.words])

    def __len__(self) -> int:
        return len(self.questions)

    def of(self, split: str) -> tuple[Question, ...]:
        """The questions of one split."""
        return tuple(q for q in self.questions if q.split == split)

    def only(self, split: str) -> Self:
        """The same set with the questions of one split alone."""
        return dataclasses.replace(self, questions=self.of(split))

    def counts(self) -> dict[str, int]:
        """Number of questions by split."""
        return {split: len(self.of(split)) for split in ("forget", "retain", "reasoning")}


@dataclasses.dataclass(frozen=True)
class ForgetSet:
    """The questions whose answers are to be forgotten, in the phrasings that are trained on."""

    questions: tuple[Question, ...]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.questions)

    def __len__(self) -> int:
        return len(self.questions)


@dataclasses.dataclass(frozen=True)
class RetainedExamples:
    """The training examples that are retained, as token ids.

    Attributes:
      retain: facts, and rehearsed examples.
      reasoning: worked reasoning problems.
    """

    GROUPS: ClassVar[tuple[str, str]] = ("retain", "reasoning")

    retain: tuple[TokenizedExample, ...]
    reasoning: tuple[TokenizedExample, ...]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([self.retain, self.reasoning])


@dataclasses.dataclass(frozen=True)
class RunData:
    """All data of a run.

    Attributes:
      splits: the examples as text.
      forget: the questions to forget.
      valid: the questions by which a checkpoint is chosen.
      test: the questions that are only reported.
      retained: the training examples to retain.
    """

    splits: Splits
    forget: ForgetSet
    valid: QuestionSet
    test: QuestionSet
    retained: RetainedExamples

    @classmethod
    def encode(cls, splits: Splits, chat: ChatFormat, limits: DataConfig) -> "RunData":
        """Encodes the splits of a run.

        Raises:
          UserError: naming the split and the example, where a prompt, or a completion that is
            trained on, is longer than config.data allows.
        """
        _check_prompts(splits, chat, limits.max_prompt_tokens)

        def encoded(name: str, examples: tuple[Example, ...]) -> tuple[TokenizedExample, ...]:
            return _encoded_completions(name, examples, chat, limits.max_completion_tokens)

        return cls(
            splits,
            ForgetSet(encode_questions(chat, {"forget": splits.forget})),
            QuestionSet(encode_questions(chat, splits.for_validation()), splits.words),
            QuestionSet(encode_questions(chat, splits.for_evaluation()), splits.words),
            RetainedExamples(
                encoded("retain", splits.retain) + encoded("rehearse", splits.rehearse),
                encoded("reasoning", splits.reasoning),
            ),
        )

    @cached_property
    def longest_forget_prompt(self) -> int:
        """Tokens of the longest prompt among the questions to forget."""
        return max(len(q.prompt_ids) for q in self.forget.questions)


def _check_prompts(splits: Splits, chat: ChatFormat, limit: int) -> None:
    for name, examples in splits.named():
        for number, example in enumerate(examples, 1):
            tokens = len(chat.prompt_ids(example.question))
            if tokens > limit:
                raise UserError(
                    f"{name}, example {number}: its prompt has {tokens} tokens, "
                    f"config.data.max_prompt_tokens is {limit}"
                )


def _encoded_completions(
    name: str, examples: tuple[Example, ...], chat: ChatFormat, limit: int
) -> tuple[TokenizedExample, ...]:
    rows = []
    for number, example in enumerate(examples, 1):
        completion = chat.completion_ids(example.cot or "", example.answer)
        if len(completion) > limit:
            raise UserError(
                f"{name}, example {number}: its chain of thought and answer have "
                f"{len(completion)} tokens, config.data.max_completion_tokens is {limit}"
            )
        rows.append(TokenizedExample(chat.prompt_ids(example.question), completion))
    return tuple(rows)
