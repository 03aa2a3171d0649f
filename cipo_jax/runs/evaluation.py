"""Stages that measure a model, and the end of a run: scores, the choice of a checkpoint, export."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from cipo_jax.data.batches import PadShape, TokenizedExample
from cipo_jax.data.records import Record, field
from cipo_jax.evals.fluency import fact_tokens, nonfact_logp
from cipo_jax.evals.leakage import GradedGeneration, Scores
from cipo_jax.language_model import LanguageModel
from cipo_jax.models.lora import Lora
from cipo_jax.runs.context import Run
from cipo_jax.runs.data import QuestionSet
from cipo_jax.runs.generation import generate_graded
from cipo_jax.runs.results import StageResult, rows
from cipo_jax.runs.weights import Weights
from cipo_jax.shared_config import SelectionConfig
from cipo_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Evaluation(StageResult):
    """Graded generations of a model and their scores."""

    schema: ClassVar[str] = "evaluation"

    scores: Scores = field("the scores of all generations")
    generations: tuple[GradedGeneration, ...] = rows("one a question")


@dataclasses.dataclass(frozen=True)
class RolloutStats(Record):
    """Leak rates of the rollouts of an iteration."""

    cot_leak: float = field("share of rollouts whose chain of thought leaks")
    answer_leak: float = field("share of rollouts whose answer leaks")
    think_completion: float = field("share of rollouts that close their think block")
    n: int = field("rollouts")


@dataclasses.dataclass(frozen=True)
class IterationRecord(StageResult):
    """An iteration, or a round, on the validation splits."""

    schema: ClassVar[str] = "iteration"

    iteration: int = field("its number, from 1")
    weights: Weights = field("the weights at its end")
    leak: float = field("the larger of the validation leaks in chain of thought and answer")
    clean: bool = field("whether the leak is at most config.selection.leak_goal")
    utility: float = field("harmonic mean of retain and reasoning accuracy and think-completion")
    validation: Scores = field("scores on the validation splits")
    rollouts: RolloutStats | None = field("of the rollouts it was trained on; null without any")


@dataclasses.dataclass(frozen=True)
class Fluency(StageResult):
    """Mean log-probability of non-fact tokens under the model before, in nats a token."""

    schema: ClassVar[str] = "fluency"

    before: float = field("of the completions before")
    after: float = field("of the completions after")


@dataclasses.dataclass(frozen=True)
class Exported(StageResult):
    """A folder that was written."""

    schema: ClassVar[str] = "exported"

    checkpoint: str = field("the checkpoint that it holds")

    @classmethod
    def files(cls, path: Path) -> tuple[Path, ...]:
        return (path,)


@dataclasses.dataclass(frozen=True)
class Result(Record):
    """The outcome of a run."""

    schema: ClassVar[str] = "result"

    method: str = field("config.method")
    before: Scores | None = field("scores of the model before; null if not measured")
    after: Scores | None = field("scores of the checkpoint that was kept; null if not measured")
    retrained: Scores | None = field("scores of a model that never saw the forget set, if any")
    iterations: tuple[IterationRecord, ...] = field("on validation, in order")
    best: int = field("number of the iteration that was kept; 0 without any")
    fluency: Fluency | None = field("log-probabilities under the model before")


# ---- the choice of an iteration


def select(history: Sequence[IterationRecord]) -> IterationRecord:
    """The iteration to keep, by validation scores alone.

    Among clean iterations the one of highest harmonic mean of utility and 1 - leak; if none is
    clean, the one of least leak. The later one wins a tie.
    """

    def rank(record: IterationRecord) -> tuple[bool, float, int]:
        return *rank_scores(record.clean, record.leak, record.utility), record.iteration

    return max(history, key=rank)


def rank_scores(clean: bool, leak: float, utility: float) -> tuple[bool, float]:
    """The sort key of `select`, without the rule for ties."""
    kept, gone = utility, 1.0 - leak
    merit = 2.0 * kept * gone / (kept + gone) if kept and gone else 0.0
    return clean, merit if clean else gone


def converged(history: Sequence[IterationRecord], selection: SelectionConfig) -> bool:
    """Whether the last `patience` iterations in a row were clean."""
    last = history[-selection.patience :]
    return len(last) == selection.patience and all(record.clean for record in last)


# ---- stage functions


def evaluate(run: Run, weights: Weights, questions: QuestionSet) -> Evaluation:
    """Greedy generations of a model on evaluation questions, graded."""
    title = f"evaluation {run.stage_name}"
    return _evaluation(run, title, run.params(weights), questions)


def evaluate_model(run: Run, model: LanguageModel, questions: QuestionSet) -> Evaluation:
    """`evaluate` for another model, such as the retrained one."""
    title = f"evaluation {run.stage_name}"
    return _evaluation(run, title, model.load_params(), questions, model)


def _evaluation(
    run: Run,
    title: str,
    params: Params,
    questions: QuestionSet,
    model: LanguageModel | None = None,
) -> Evaluation:
    generations = generate_graded(run, "evaluation", title, params, questions, model)
    return Evaluation(Scores.from_graded(generations, questions.words), generations)


def validate(
    run: Run,
    weights: Weights,
    questions: QuestionSet,
    iteration: int,
    rollouts: RolloutStats | None,
) -> IterationRecord:
    """Scores on the validation splits, by which early stop and checkpoint go."""
    title = f"iteration {iteration}: validation"
    scores = _evaluation(run, title, run.params(weights), questions).scores
    leak = scores.forget.leak if scores.forget else 0.0
    return IterationRecord(
        iteration=iteration,
        weights=weights,
        leak=leak,
        clean=leak <= run.config.selection.leak_goal,
        utility=scores.utility or 0.0,
        validation=scores,
        rollouts=rollouts,
    )


def validated(
    run: Run, weights: Weights, iteration: int, rollouts: RolloutStats | None = None
) -> IterationRecord:
    """The stage `validate` at an iteration's place, with its file metrics.json and a line."""
    data = run.workspace.data
    record = run.stage("validate", validate, weights, data.valid, iteration, rollouts)
    if not run.path("metrics.json").exists():
        compiled = {"compilations": run.compilations_since_last()}
        run.write_json("metrics.json", record.to_row() | compiled)
    scores = record.validation
    leaks = scores.forget
    said = f"{leaks.cot_leak:.1%} in CoT, {leaks.answer_leak:.1%} in answers" if leaks else "n/a"
    kept = ", ".join(
        f"{name} {'n/a' if split is None else format(split.accuracy, '.1%')}"
        for name, split in (("retain", scores.retain), ("reasoning", scores.reasoning))
    )
    run.reporter.line(f"iteration {iteration}: validation leak {said}; {kept}")
    return record


def measure_fluency(
    run: Run, base: Weights, before: Evaluation, after: Evaluation, questions: QuestionSet
) -> Fluency:
    """Log-probability, under the base parameters, of the completions before and after."""
    model, words = run.workspace.model, run.workspace.data.splits.fact_words
    params, prompts = run.params(base), questions.of("forget")

    def nats(evaluation: Evaluation) -> float:
        said = [g for g in evaluation.generations if g.split == "forget"]
        scored = [TokenizedExample(q.prompt_ids, g.ids) for q, g in zip(prompts, said, strict=True)]
        facts = [fact_tokens(model.chat.tokenizer, g.ids, words) for g in said]
        shape = PadShape.fitting(scored)
        return nonfact_logp(run.workspace.scorer.token_logps(params, scored, shape), facts)

    return Fluency(nats(before), nats(after))


def export_merged(run: Run, weights: Weights) -> Exported:
    """export/: the unlearned model as a Hugging Face folder."""
    trained = run.state.weights.get(weights).params
    run.workspace.model.save(run.folder / run.prefix, trained, run.config.model.export_dtype)
    return Exported(weights.name)


def export_adapter(run: Run, weights: Weights) -> Exported:
    """adapter/: the adapters as PEFT reads them."""
    trained = run.state.weights.get(weights).params
    run.workspace.model.save(run.folder / run.prefix, trained, form="adapter")
    return Exported(weights.name)


# ---- the retrained model, and the end of a run


def open_retrained(run: Run) -> LanguageModel | None:
    """The model that never saw this very forget set, if config.model.retrained is one."""
    config = run.config
    if not config.model.retrained:
        return None
    model = LanguageModel.from_config(
        dataclasses.replace(config.model, path=config.model.retrained),
        config.think,
        run.workspace.model.mesh,
    )
    never_saw = model.pretrained.never_saw()
    if never_saw is not None and set(never_saw) != run.workspace.data.splits.forgotten_people:
        run.reporter.line(
            "no retrained column: the retrained model that ships never saw another forget set"
        )
        return None
    return model


def evaluate_retrained(run: Run) -> Evaluation | None:
    """Scores of the retrained model, where there is one."""
    model = open_retrained(run)
    if model is None:
        return None
    return run.stage("evals/retrained", evaluate_model, model, run.workspace.data.test)


def export(run: Run, weights: Weights) -> None:
    """Exports weights: the merged model, and adapters by themselves."""
    run.stage("export", export_merged, weights)
    if isinstance(run.workspace.model.trainable, Lora):
        run.stage("adapter", export_adapter, weights)


def conclude(run: Run, before: Evaluation, history: Sequence[IterationRecord]) -> Result:
    """Evaluates and exports the iteration that is kept."""
    best, test = select(history), run.workspace.data.test
    after = run.stage("evals/after", evaluate, best.weights, test)
    retrained = evaluate_retrained(run)
    fluency = run.stage("fluency", measure_fluency, run.base, before, after, test)
    export(run, best.weights)
    return Result(
        method=run.config.method,
        before=before.scores,
        after=after.scores,
        retrained=retrained.scores if retrained else None,
        iterations=tuple(history),
        best=best.iteration,
        fluency=fluency,
    )
