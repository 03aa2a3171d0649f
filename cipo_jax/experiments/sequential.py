"""Requests to forget, one after another, each on the model that the last one left.

Two things are lost on the way unless something keeps them: what was forgotten earlier comes back,
and the model no longer writes what the next request learns from. So later requests also retain what
the model says, without a leak, to the questions of earlier ones (`config.sequence.replay`), and how
the base model writes counterfactuals about who is retained (`config.sequence.skills`). What a
request is given of these holds nothing that it or an earlier one is to forget.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from cipo_jax.config import Config
from cipo_jax.data.records import Record, field, write_record
from cipo_jax.data.splits import load_splits, spread
from cipo_jax.data.tiny_world import World
from cipo_jax.errors import UserError
from cipo_jax.evals.evaluate import Question, encode_questions
from cipo_jax.evals.leakage import GradedGeneration, Scores, leak_rate
from cipo_jax.experiments.unlearn import derive_run, open_run
from cipo_jax.files import write_jsonl
from cipo_jax.hub import resolve
from cipo_jax.methods.base import Method
from cipo_jax.methods.counterfactuals import WrittenExample, written_examples
from cipo_jax.methods.registry import resolve_method
from cipo_jax.methods.trace_checks import text_faults
from cipo_jax.progress import Reporter
from cipo_jax.runs.context import WORKDIR, Run
from cipo_jax.runs.data import ForgetSet, QuestionSet
from cipo_jax.runs.evaluation import evaluate, export, select
from cipo_jax.runs.generation import Generation, generate_graded
from cipo_jax.runs.measurement import IterationsOnly
from cipo_jax.runs.results import StageResult, rows
from cipo_jax.runs.weights import Weights
from cipo_jax.shared_config import CounterfactualConfig


@dataclasses.dataclass(frozen=True)
class SaidExample(Record):
    """A clean answer of the model to a question that was forgotten."""

    schema: ClassVar[str] = "said_example"
    stored_in: ClassVar[tuple[str, ...]] = ("request-NN/said.jsonl",)

    question: str = field("the question")
    cot: str = field("chain of thought")
    answer: str = field("answer")


@dataclasses.dataclass(frozen=True)
class Said(StageResult):
    """Clean answers of a model to the questions that it forgot."""

    schema: ClassVar[str] = "said"

    asked: int = field("questions that were asked")
    examples: tuple[SaidExample, ...] = rows("the clean answers")


@dataclasses.dataclass(frozen=True)
class Skills(StageResult):
    """Writing tasks of the base model, on people who are retained."""

    schema: ClassVar[str] = "skills"

    asked: int = field("questions that were asked about")
    examples: tuple[WrittenExample, ...] = rows("prompts of writing tasks and what was written")


@dataclasses.dataclass(frozen=True)
class Rehearsal(StageResult):
    """The file of further examples that a request retains."""

    schema: ClassVar[str] = "rehearsal"

    examples: int = field("examples in the file")

    @classmethod
    def files(cls, path: Path) -> tuple[Path, ...]:
        return (path.with_name(f"{path.name}.jsonl"),)


@dataclasses.dataclass(frozen=True)
class RequestScores(StageResult):
    """The model after a request, on all that was forgotten so far."""

    schema: ClassVar[str] = "request_scores"

    iteration: int = field("the iteration that was kept")
    all: Scores = field("everybody forgotten so far, who is still retained, and reasoning")
    own_leak: float | None = field("leak of this request's people alone")
    generations: tuple[GradedGeneration, ...] = rows("one a question")


@dataclasses.dataclass(frozen=True)
class RequestResult(Record):
    """A request."""

    people: tuple[str, ...] = field("whom it names")
    iteration: int = field("the iteration that was kept")
    all: Scores = field("everybody forgotten so far, who is still retained, and reasoning")
    own_leak: float | None = field("leak of this request's people alone")


@dataclasses.dataclass(frozen=True)
class SequenceResult(Record):
    """All requests."""

    schema: ClassVar[str] = "sequence"
    stored_in: ClassVar[tuple[str, ...]] = ("sequence.json",)

    before: Scores = field("scores of the base model")
    requests: tuple[RequestResult, ...] = field("in order")


def requests_of(config: Config) -> list[tuple[str, ...]]:
    """Whom each request names, drawn by config.forget.seed.

    Raises:
      UserError: without a tiny world, or where it has too few people.
    """
    if not config.data.world:
        raise UserError("config.data.world is empty: requests in sequence name people of a world")
    names = [p.name for p in World.load(resolve(config.data.world)).people]
    count, size = config.sequence.requests, config.sequence.people
    if count * size >= len(names):
        raise UserError(
            f"config.sequence: {count} requests of {size} people leave nobody of {len(names)}"
        )
    order = np.random.default_rng(config.forget.seed).permutation(len(names))
    drawn = [names[i] for i in order[: count * size]]
    return [tuple(drawn[i * size : (i + 1) * size]) for i in range(count)]


def unlearn_in_sequence(config: Config, workdir: str, reporter: Reporter) -> SequenceResult:
    """Every request by config.method; also writes sequence.json.

    Raises:
      UserError: for settings that a sequence cannot have.
    """
    method, config = resolve_method(config)
    wanted = requests_of(config)
    _check(config, method)
    _, root = open_run(_request_config(config, wanted, 0, config.model.path), workdir, reporter)
    root.preemption.install_signal_handlers()
    before = root.stage("evals/before", evaluate, root.base, root.workspace.data.test)
    skills, said = _skills(root, method), list[SaidExample]()
    path, results = config.model.path, []
    for number, people in enumerate(wanted):
        reporter.line(f"request {number + 1} of {len(wanted)}: {', '.join(people)}")
        name = f"request-{number + 1:02d}"
        plain = _request_config(config, wanted, number, path)
        rehearse = _rehearsal(root, name, plain, skills, said)
        asked = dataclasses.replace(plain, data=dataclasses.replace(plain.data, rehearse=rehearse))
        run, result = _request(root, asked, name, people, reporter)
        results.append(result)
        if method.retains(config) and config.sequence.replay:
            said += _say(run, result.iteration).examples
        _report(reporter, number, result)
        path = str(run.folder / "export")
    sequence = SequenceResult(before.scores, tuple(results))
    write_record(root.path("sequence.json"), sequence)
    return sequence


def _check(config: Config, method: Method) -> None:
    if not method.trains:
        raise UserError(f"config.method = {config.method!r}: trains nothing; choose another")
    if config.lora.path:
        raise UserError(
            "config.lora.path: each request would add these adapters once more; export the model "
            "with them merged (`export`), and give that as config.model.path"
        )
    if config.data.rehearse:
        raise UserError("config.data.rehearse: a sequence makes its own; see config.sequence")


def _request_config(
    config: Config, wanted: Sequence[tuple[str, ...]], number: int, path: str
) -> Config:
    """The config of a request, but for what it rehearses."""
    earlier = tuple(name for names in wanted[:number] for name in names)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=path, retrained=""),
        forget=dataclasses.replace(config.forget, people=wanted[number], earlier=earlier),
    )


def _recorded(config: Config, root: Path) -> Config:
    """The config as config.json keeps it: paths inside of the sequence are relative to a request.

    So the folder of a sequence may be moved.
    """

    def relative(path: str) -> str:
        inside = path and Path(path).is_relative_to(root)
        return f"{WORKDIR}../{Path(path).relative_to(root)}" if inside else path

    model = dataclasses.replace(config.model, path=relative(config.model.path))
    data = dataclasses.replace(config.data, rehearse=relative(config.data.rehearse))
    return dataclasses.replace(config, model=model, data=data)


def _request(
    root: Run, config: Config, name: str, people: tuple[str, ...], reporter: Reporter
) -> tuple[Run, RequestResult]:
    """Carries a request out, exports its model and scores it."""
    recorded = _recorded(config, root.folder)
    method, run = derive_run(root, config, root.folder / name, reporter, recorded)
    history = method.run(run, IterationsOnly()).iterations
    best = select(history)
    export(run, best.weights)
    scores = run.stage("evals/all", score_request, best.weights, best.iteration, _all_so_far(run))
    run.metrics.close()
    return run, RequestResult(people, best.iteration, scores.all, scores.own_leak)


def _all_so_far(run: Run) -> QuestionSet:
    """The test questions, with everybody who was forgotten so far."""
    config = run.config
    both = (*config.forget.people, *config.forget.earlier)
    forget = dataclasses.replace(config.forget, people=both, earlier=())
    splits = load_splits(config.data, forget)
    chat = run.workspace.model.chat
    return QuestionSet(encode_questions(chat, splits.for_evaluation()), splits.words)


def score_request(
    run: Run, weights: Weights, iteration: int, questions: QuestionSet
) -> RequestScores:
    """Stage: the model after a request, on all that was forgotten so far."""
    params = run.params(weights)
    generations = generate_graded(run, "all", "all so far", params, questions)
    scores = Scores.from_graded(generations, run.workspace.data.splits.words)
    asked = {q.example.question for q in run.workspace.data.test.of("forget")}
    own = [g for g in generations if g.split == "forget" and g.question in asked]
    return RequestScores(iteration, scores, leak_rate(own), generations)


# ---- what later requests rehearse


def _say(run: Run, iteration: int) -> Said:
    """The stage `sample_said`, and a line."""
    weights = _weights_of(run, iteration)
    said = run.stage("said", sample_said, weights, run.workspace.data.forget)
    run.reporter.line(f"replay: {len(said.examples)} of {said.asked} answers are clean")
    return said


def _weights_of(run: Run, iteration: int) -> Weights:
    result = run.ledger.result(f"iterations/{iteration:02d}/train")
    return Weights.load(run.path("train"), result)


def sample_said(run: Run, weights: Weights, forget: ForgetSet) -> Said:
    """Stage: what the model says to the questions that it forgot, as far as it is clean."""
    questions = QuestionSet(forget.questions, frozenset())
    title, params = "what is said now", run.params(weights)
    generations = generate_graded(run, "said", title, params, questions)
    limit = run.config.eval.max_new_tokens
    min_distinct = run.config.counterfactual.min_distinct
    kept = [
        SaidExample(g.question, g.cot, g.answer)
        for g, question in zip(generations, forget.questions, strict=True)
        if is_clean(g, question, limit, min_distinct)
    ]
    return Said(len(generations), tuple(kept))


def is_clean(
    graded: GradedGeneration, question: Question, max_new_tokens: int, min_distinct: float
) -> bool:
    """Whether a model may learn again what it says: it ends, leaks nothing, does not break down.

    Args:
      graded: what it says.
      question: the forget question.
      max_new_tokens: where generations are cut.
      min_distinct: distinct words / words of the thought, at least.
    """
    stopped = graded.tokens < max_new_tokens
    said = Generation(0, 0, graded.cot, graded.answer, graded.closed, stopped, graded.ids)
    # A refusal may be as short as its one word.
    return not text_faults(said, question.example, graded.answer, min_distinct, min_words=1)


def _skills(root: Run, method: Method) -> tuple[WrittenExample, ...]:
    """Writing tasks of the base model, on people who are retained."""
    config = root.config
    assert isinstance(config, Config)
    settings, count = method.trace_settings(config), config.sequence.skills
    if not (count and method.retains(config) and settings is not None):
        return ()
    chat, splits = root.workspace.model.chat, root.workspace.data.splits
    about = spread(tuple(e for e in splits.retain if e.group), count)
    questions = encode_questions(chat, {"retain": about})
    found = root.stage("skills", write_skills, root.base, questions, settings)
    root.reporter.line(f"skills: {len(found.examples)} examples from {found.asked} questions")
    return found.examples


def write_skills(
    run: Run, base: Weights, questions: Sequence[Question], settings: CounterfactualConfig
) -> Skills:
    """Stage: the writing tasks, on questions about who is retained."""
    written = written_examples(run, run.params(base), questions, settings)
    return Skills(len(questions), written)


def _rehearsal(
    root: Run,
    name: str,
    config: Config,
    skills: Sequence[WrittenExample],
    said: Sequence[SaidExample],
) -> str:
    """Path of what a request retains beside facts and reasoning; "" for nothing."""
    retained = {e.question for e in load_splits(config.data, config.forget).retain}
    kept = [s for s in skills if s.about in retained]
    examples = tuple(e for e in _as_said(kept, said) if _fits(root, e))
    if not examples:
        return ""
    root.stage(f"rehearsal/{name}", write_rehearsal, examples)
    return str(root.folder / "rehearsal" / f"{name}.jsonl")


def _as_said(
    skills: Iterable[WrittenExample], said: Iterable[SaidExample]
) -> Iterable[SaidExample]:
    yield from (SaidExample(s.question, s.cot, s.answer) for s in skills)
    yield from said


def write_rehearsal(run: Run, examples: Sequence[SaidExample]) -> Rehearsal:
    """Stage: the file that the request reads as config.data.rehearse."""
    fields = ("question", "cot", "answer")
    path = run.folder / f"{run.prefix}.jsonl"
    write_jsonl(path, ({f: getattr(e, f) for f in fields} for e in examples))
    return Rehearsal(len(examples))


def _fits(run: Run, example: SaidExample) -> bool:
    """Whether it is as short as what is trained on has to be."""
    chat, limits = run.workspace.model.chat, run.config.data
    return (
        len(chat.prompt_ids(example.question)) <= limits.max_prompt_tokens
        and len(chat.completion_ids(example.cot, example.answer)) <= limits.max_completion_tokens
    )


def _report(reporter: Reporter, number: int, result: RequestResult) -> None:
    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.1%}"

    scores = result.all
    forget, retain, reasoning = scores.forget, scores.retain, scores.reasoning
    reporter.line(
        f"request {number + 1}: leak of all so far {percent(forget.cot_leak if forget else None)} "
        f"in CoT, {percent(forget.answer_leak if forget else None)} in answers (of this one "
        f"{percent(result.own_leak)}); retain {percent(retain.accuracy if retain else None)}, "
        f"reasoning {percent(reasoning.accuracy if reasoning else None)}"
    )
