"""Sampling and evaluation inside of a stage: with a progress bar, resumable item by item."""

import dataclasses
from collections.abc import Iterator
from typing import TypeVar

from cipo_jax.data.records import Record, field
from cipo_jax.evals.evaluate import graded
from cipo_jax.evals.leakage import GradedGeneration
from cipo_jax.language_model import LanguageModel
from cipo_jax.progress import Bar
from cipo_jax.runs.context import Run
from cipo_jax.runs.data import QuestionSet
from cipo_jax.runs.parts import OnItem
from cipo_jax.sampling.job import Completion, SamplingJob
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Generation(Record):
    """One sampled completion, as text and as token ids."""

    item: int = field("index of the request")
    sample: int = field("index among the samples of the request")
    cot: str = field("chain of thought; all the text where the think block was not closed")
    answer: str = field("text after the think block")
    closed: bool = field("whether the think block was closed")
    stopped: bool = field("whether it ended with a stop token, before max_new_tokens")
    ids: tuple[int, ...] = field("token ids, the stop token included")

    @classmethod
    def from_completion(cls, completion: Completion, chat: ChatFormat) -> "Generation":
        """The texts of a completion."""
        thought = chat.split(completion.ids)
        return cls(
            item=completion.item,
            sample=completion.sample,
            cot=thought.cot,
            answer=thought.answer,
            closed=thought.closed,
            stopped=completion.stopped,
            ids=tuple(completion.ids),
        )


R = TypeVar("R", Generation, GradedGeneration)


def _reports(bar: Bar) -> OnItem[R]:
    def on_item(records: tuple[R, ...], cached: bool) -> None:
        if cached:
            bar.skip(len(records))
        else:
            bar.advance(len(records), sum(len(record.ids) for record in records))

    return on_item


def sample_generations(
    run: Run,
    name: str,
    title: str,
    params: Params,
    job: SamplingJob,
) -> list[tuple[Generation, ...]]:
    """The samples of each request of a job.

    Args:
      run: inside of a stage.
      name: distinguishes several such calls of a stage.
      title: of the progress bar.
      params: from `Run.params`.
      job: what to sample.
    """
    requests, num_samples = job.requests, job.num_samples
    if not requests:
        return []
    sampler, chat = run.workspace.sampler, run.workspace.model.chat
    decoding = sampler.prepare(params)

    def work(missing: list[int]) -> Iterator[tuple[int, tuple[Generation, ...]]]:
        wanted = dataclasses.replace(job, requests=[requests[i] for i in missing])
        for i, drawn in sampler.stream_requests(decoding, wanted):
            yield missing[i], tuple(Generation.from_completion(c, chat) for c in drawn)

    with run.reporter.bar(title, len(requests) * num_samples) as bar:
        return run.resumable_map(name, Generation, len(requests), work, _reports(bar))


def generate_graded(
    run: Run,
    name: str,
    title: str,
    params: Params,
    questions: QuestionSet,
    model: LanguageModel | None = None,
    prefill: str = "",
) -> tuple[GradedGeneration, ...]:
    """Greedy generations to questions, graded.

    Args:
      run: inside of a stage.
      name: distinguishes several such calls of a stage.
      title: of the progress bar.
      params: from `Run.params`.
      questions: to be asked.
      model: whose shape and format; the run's own by default.
      prefill: how completions begin; see `evals.attacks`.
    """
    workspace = run.workspace
    model = model or workspace.model
    sampler = workspace.eval_sampler  # Another model of the same shape shares its programs.
    if model.config != workspace.model.config:
        sampler = dataclasses.replace(sampler, config=model.config)
    decoding = sampler.prepare(params)

    def work(missing: list[int]) -> Iterator[tuple[int, tuple[GradedGeneration, ...]]]:
        asked = [questions.questions[i] for i in missing]
        limit = run.config.eval.max_new_tokens
        for i, generation in graded(sampler, model.chat, decoding, asked, limit, prefill):
            yield missing[i], (generation,)

    with run.reporter.bar(title, len(questions)) as bar:
        found = run.resumable_map(name, GradedGeneration, len(questions), work, _reports(bar))
    return tuple(generation for (generation,) in found)
