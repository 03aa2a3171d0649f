"""Targets: completions that a method trains on besides the forget completions.

A target builder is part of a method's entry. Completions that it samples from the model are a stage
of their own, with a readable file; the trials of a comparison share it.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from cipo_jax.data.batches import TokenizedExample
from cipo_jax.data.records import Record, field
from cipo_jax.methods.counterfactuals import counterfactuals
from cipo_jax.runs.context import Run
from cipo_jax.runs.data import ForgetSet
from cipo_jax.runs.generation import Generation, sample_generations
from cipo_jax.runs.results import StageResult, rows
from cipo_jax.runs.weights import Weights
from cipo_jax.sampling.job import Request, SamplingJob
from cipo_jax.sampling.params import SamplingParams
from cipo_jax.shared_config import CounterfactualConfig, RunConfig


class Target(NamedTuple):
    """A completion that goes with a forget question.

    Attributes:
      item: index of the question.
      tokens: prompt and completion.
    """

    item: int
    tokens: TokenizedExample


@dataclasses.dataclass(frozen=True)
class TargetBuilder:
    """Base class: gives the targets of a run. Questions without a target are left out."""

    def build(self, run: Run, originals: Sequence[TokenizedExample]) -> tuple[Target, ...]:
        """The targets, by question.

        Args:
          run: where stages are kept.
          originals: the completion to forget of each question; see `original_completions`.
        """
        raise NotImplementedError

    def trace_settings(self, config: RunConfig) -> CounterfactualConfig | None:
        """Settings of the traces that it samples from the model; None if it samples none."""
        del config
        return None


@dataclasses.dataclass(frozen=True)
class CounterfactualTargets(TargetBuilder):
    """The model's own traces to other answers."""

    def build(self, run: Run, originals: Sequence[TokenizedExample]) -> tuple[Target, ...]:
        del originals
        return trace_targets(run, "counterfactuals", run.config.counterfactual)

    def trace_settings(self, config: RunConfig) -> CounterfactualConfig | None:
        return config.counterfactual


def trace_targets(run: Run, name: str, settings: CounterfactualConfig) -> tuple[Target, ...]:
    """Targets from the traces of a stage NAME."""
    made = counterfactuals(run, name, settings)
    return tuple(Target(c.item, c.tokenized()) for c in made.accepted)


# ---- forget completions


@dataclasses.dataclass(frozen=True)
class OwnAnswer(Record):
    """What the model says to a forget question, greedily."""

    schema: ClassVar[str] = "own_answer"
    stored_in: ClassVar[tuple[str, ...]] = ("own.jsonl",)

    question: str = field("the question")
    cot: str = field("chain of thought")
    answer: str = field("answer")
    closed: bool = field("whether the think block was closed")
    ids: tuple[int, ...] = field("token ids, the stop token included")


@dataclasses.dataclass(frozen=True)
class OwnAnswers(StageResult):
    """What the model says to all forget questions."""

    schema: ClassVar[str] = "own_answers"

    answers: tuple[OwnAnswer, ...] = rows("one a forget question")


def sample_own_answers(run: Run, base: Weights, forget: ForgetSet) -> OwnAnswers:
    """Stage: what the model says to each forget question, greedily."""
    requests = [Request(q.prompt_ids, i) for i, q in enumerate(forget.questions)]
    limit = run.config.sampling.max_new_tokens
    greedy = SamplingParams.for_chat(run.workspace.model.chat, limit)
    job = SamplingJob(requests, greedy, run.key("own"))
    drawn = sample_generations(run, "own", "the model's own thoughts", run.params(base), job)
    return OwnAnswers(
        tuple(_own(q.example.question, g) for q, (g,) in zip(forget.questions, drawn, strict=True))
    )


def _own(question: str, generation: Generation) -> OwnAnswer:
    g = generation
    return OwnAnswer(question, g.cot, g.answer, g.closed, g.ids)


def own_answers(run: Run) -> OwnAnswers:
    """The stage `sample_own_answers`."""
    return run.stage("own", sample_own_answers, run.base, run.workspace.data.forget)


def original_completions(run: Run) -> tuple[TokenizedExample, ...]:
    """The completion to forget of each question: the data's, or what the model says."""
    chat, questions = run.workspace.model.chat, run.workspace.data.forget.questions
    own = None if all(q.example.cot for q in questions) else own_answers(run).answers
    found = []
    for i, question in enumerate(questions):
        example = question.example
        if example.cot:
            completion: Sequence[int] = chat.completion_ids(example.cot, example.answer)
        else:
            assert own is not None
            completion = own[i].ids
        found.append(TokenizedExample(question.prompt_ids, completion))
    return tuple(found)
