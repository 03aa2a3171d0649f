"""Counterfactual traces: other answers, and the reasoning that leads to them.

The model to be unlearned writes them itself (CiPO, arXiv 2604.15847): it names another answer
unless the user gives one, then reasons backward to it. Of several candidates the best that passes
every check of `trace_checks` is kept.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from cipo_jax.data.records import Record, field
from cipo_jax.errors import UserError
from cipo_jax.evals.evaluate import Question
from cipo_jax.methods.counterfactual_records import (
    AcceptedTrace,
    Counterfactual,
    Counterfactuals,
    RejectedTrace,
)
from cipo_jax.methods.trace_checks import Candidate, judge
from cipo_jax.runs.context import Run
from cipo_jax.runs.data import ForgetSet
from cipo_jax.runs.generation import Generation, sample_generations
from cipo_jax.runs.weights import Weights
from cipo_jax.sampling.job import Request, SamplingJob
from cipo_jax.sampling.params import SamplingParams
from cipo_jax.shared_config import CounterfactualConfig
from cipo_jax.text.matching import normalized_words, reveals
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class WrittenExample(Record):
    """A prompt of a writing task and what a model wrote to it."""

    schema: ClassVar[str] = "written_example"
    stored_in: ClassVar[tuple[str, ...]] = ("skills.jsonl",)

    about: str = field("the question that it is about")
    question: str = field("the prompt, as the user's text")
    cot: str = field("chain of thought")
    answer: str = field("answer")


@dataclasses.dataclass
class _Item:
    """A forget question on its way to a counterfactual."""

    index: int
    question: Question
    target: str | None
    source: str
    named: Generation | None = None  # What named the target, where the model was asked for one.
    written: Generation | None = None
    accepted: AcceptedTrace | None = None
    rejected: list[RejectedTrace] = dataclasses.field(default_factory=list)


def make_counterfactuals(
    run: Run, base: Weights, forget: ForgetSet, settings: CounterfactualConfig
) -> Counterfactuals:
    """Stage: a counterfactual for each forget question, as far as the model writes a valid one.

    The stage's name addresses the random numbers: stages of other names draw others.

    Raises:
      UserError: where not one question has a valid trace.
    """
    writer = _Writer(run, run.params(base), settings)
    items = [writer.item(i, question) for i, question in enumerate(forget.questions)]
    for attempt in range(settings.rounds):
        if all(item.accepted for item in items):
            break
        writer.attempt(items, attempt)
    if not any(item.accepted for item in items):
        why = items[0].rejected[0].why[0] if items[0].rejected else "no target answer was found"
        raise UserError(
            f"counterfactuals: not one of {len(items)} questions got a valid trace (the first: "
            f"{why}); look at config.counterfactual, its prompts and its candidates"
        )
    questions = tuple(_record(item, settings.strategy) for item in items)
    drawn = sum((item.accepted is not None) + len(item.rejected) for item in items)
    return Counterfactuals(drawn, questions)


def counterfactuals(
    run: Run, name: str = "counterfactuals", settings: CounterfactualConfig | None = None
) -> Counterfactuals:
    """The stage `make_counterfactuals`, and a line that counts what it found."""
    settings = settings or run.config.counterfactual
    made = run.stage(name, make_counterfactuals, run.base, run.workspace.data.forget, settings)
    run.reporter.line(
        f"{name}: {len(made.accepted)} of {len(made.questions)} questions have a valid trace "
        f"({made.candidates} candidates)"
    )
    for question in made.without_trace:
        run.reporter.line(f"  none for: {question.question}")
    return made


def written_examples(
    run: Run, params: Params, questions: Sequence[Question], settings: CounterfactualConfig
) -> tuple[WrittenExample, ...]:
    """How a model writes counterfactuals, as examples to learn from; inside of a stage.

    Two for each question that came out well: naming another answer, where the model does so and
    thinks about it, and reasoning to it.
    """
    writer = _Writer(run, params, settings)
    items = [writer.item(i, question) for i, question in enumerate(questions)]
    writer.attempt(items, 0)
    examples = []
    for item in items:
        if item.accepted is None:
            continue
        for prompt, wrote in (
            (writer.target_prompt(item), item.named),
            (writer.trace_prompt(item), item.written),
        ):
            if wrote is not None and wrote.cot.strip():
                about = item.question.example.question
                examples.append(WrittenExample(about, prompt, wrote.cot, wrote.answer))
    return tuple(examples)


@dataclasses.dataclass(frozen=True)
class _Writer:
    """A model that is asked for target answers and traces."""

    run: Run
    params: Params
    settings: CounterfactualConfig

    def item(self, index: int, question: Question) -> _Item:
        """A question with the target that data or strategy give it, if any."""
        settings, example = self.settings, question.example
        fixed = {"boundary": settings.boundary_answer, "refusal": settings.refusal_answer}
        if settings.strategy in fixed:
            return _Item(index, question, fixed[settings.strategy], "strategy")
        target = example.target_answer
        if target is None:
            return _Item(index, question, None, "model")
        leaked = [f for f in example.forbidden if reveals(target, f, example.question)]
        if leaked:
            raise UserError(
                f"forget row {index + 1}: field 'target_answer' = {target!r} mentions "
                f"{leaked[0]!r}, which is to be forgotten; choose another"
            )
        return _Item(index, question, target, "given")

    def attempt(self, items: Sequence[_Item], attempt: int) -> None:
        """Targets and traces for the items that have no trace yet."""
        self._choose_targets(items, attempt)
        ready = [item for item in items if item.accepted is None and item.target is not None]
        drawn = self._draw_traces(ready, attempt)
        candidates = [
            [Candidate(item.question, item.target or "", g) for g in generations]
            for item, generations in zip(ready, drawn, strict=True)
        ]
        judged = judge(self.run, self.params, candidates, self.settings)
        for item, (accepted, rejected, written) in zip(ready, judged, strict=True):
            item.accepted, item.written = accepted, written
            item.rejected += rejected

    def _choose_targets(self, items: Sequence[_Item], attempt: int) -> None:
        """Has the model name another answer for each group of questions that lacks one.

        Questions of one group get the same target, so that what the model learns to say is
        consistent. In a later attempt a group of which no question has a trace gets a new target.
        """
        groups: dict[str, list[_Item]] = {}
        for item in items:
            example = item.question.example
            if item.source == "model":
                groups.setdefault(example.group or example.question, []).append(item)
        wanting = [g for g in groups.values() if not any(item.accepted for item in g)]
        leaders = [group[0] for group in wanting]
        drawn = self._sample(
            f"targets-{attempt}",
            f"target answers, try {attempt + 1}",
            leaders,
            [self.target_prompt(leader) for leader in leaders],
            self._key("targets", attempt),
        )
        for group, candidates in zip(wanting, drawn, strict=True):
            named = next((c for c in candidates if self._is_target(c, group)), None)
            if named is not None:
                group[0].named = named
                for item in group:
                    item.target = named.answer

    def _is_target(self, named: Generation, group: Sequence[_Item]) -> bool:
        """Whether a generation names an answer that a group may take."""
        words = normalized_words(named.answer)
        forbidden = [(f, item.question.example) for item in group for f in
                     item.question.example.forbidden]  # fmt: skip
        return (
            named.closed
            and named.stopped
            and 0 < len(words) <= self.settings.max_target_words
            and named.answer not in {item.target for item in group}
            and not any(reveals(named.answer, f, e.question) for f, e in forbidden)
        )

    def _draw_traces(
        self, items: Sequence[_Item], attempt: int
    ) -> list[tuple[Generation, ...]]:
        return self._sample(
            f"traces-{attempt}",
            f"{self.run.stage_name}, try {attempt + 1}",
            items,
            [self.trace_prompt(item) for item in items],
            self._key("traces", attempt),
        )

    def target_prompt(self, item: _Item) -> str:
        template, example = self.settings.target_prompt, item.question.example
        return template.format(question=example.question, answer=example.answer)

    def trace_prompt(self, item: _Item) -> str:
        template = getattr(self.settings, f"{self.settings.strategy}_prompt")
        return template.format(question=item.question.example.question, answer=item.target)

    def _sample(
        self, name: str, title: str, items: Sequence[_Item], prompts: Sequence[str], key: Array
    ) -> list[tuple[Generation, ...]]:
        chat, settings = self.run.workspace.model.chat, self.settings
        requests = [
            Request(chat.prompt_ids(p), i.index) for p, i in zip(prompts, items, strict=True)
        ]
        limit = self.run.config.sampling.max_new_tokens
        params = SamplingParams.for_chat(chat, limit, settings.temperature, settings.top_p)
        job = SamplingJob(requests, params, key, settings.num_candidates)
        return sample_generations(self.run, name, title, self.params, job)

    def _key(self, what: str, attempt: int) -> Array:
        name = self.run.stage_name
        return self.run.key(*(() if name == "counterfactuals" else (name,)), what, attempt)


def _record(item: _Item, strategy: str) -> Counterfactual:
    example = item.question.example
    return Counterfactual(
        item=item.index,
        question=example.question,
        true_answer=example.answer,
        target_answer=item.target,
        target_source=item.source,
        strategy=strategy,
        prompt_ids=tuple(item.question.prompt_ids),
        accepted=item.accepted,
        rejected=tuple(item.rejected),
    )
