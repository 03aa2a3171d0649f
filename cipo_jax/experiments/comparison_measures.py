"""Measurements of a comparison, as stages."""

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from cipo_jax.data.batches import TokenizedExample
from cipo_jax.data.records import field, write_records
from cipo_jax.evals.distance import divergence, forget_quality, truth_ratios
from cipo_jax.evals.leakage import GradedGeneration, Scores, leak_rate
from cipo_jax.language_model import LanguageModel
from cipo_jax.runs.context import Run
from cipo_jax.runs.data import QuestionSet
from cipo_jax.runs.generation import generate_graded
from cipo_jax.runs.results import StageResult, rows
from cipo_jax.runs.weights import Weights
from cipo_jax.typing import Params

# In the order of the table: key, heading, whether more is better (None: neither).
MEASURES: tuple[tuple[str, str, bool | None], ...] = (
    ("cot_leak", "CoT leak %", False),
    ("answer_leak", "answer leak %", False),
    ("zero_leak", "ZeroThink leak %", False),
    ("less_leak", "LessThink leak %", False),
    ("think_completion", "think-completion %", True),
    ("retain", "retain %", True),
    ("reasoning", "reasoning %", True),
    ("ks", "KS p", True),
    ("kl", "KL nats", False),
    ("steps", "steps", None),
    ("seconds", "s", None),
    ("peak_gib", "GiB", None),
)


@dataclasses.dataclass(frozen=True)
class Measures(StageResult):
    """Scores of one model; null where a split or a model to compare with is missing."""

    schema: ClassVar[str] = "measures"

    cot_leak: float | None = field("share of forget questions whose chain of thought leaks")
    answer_leak: float | None = field("share of forget questions whose answer leaks")
    think_completion: float | None = field("share of forget questions that close their think block")
    retain: float | None = field("accuracy on retained questions")
    reasoning: float | None = field("accuracy on reasoning questions")
    zero_leak: float | None = field("leak under ZeroThink")
    less_leak: float | None = field("leak under LessThink")
    ks: float | None = field("p of the KS test of truth ratios against the retrained model's")
    kl: float | None = field("KL(retrained || model) on the retrained model's completions, in nats")

    def present(self) -> dict[str, float]:
        """The measures that there are."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class RetrainedMeasures(StageResult):
    """The retrained model: its scores, truth ratios and completions."""

    schema: ClassVar[str] = "retrained_measures"

    measures: Measures = field("its scores")
    ratios: tuple[float, ...] = field("truth ratios of the forget questions that have them")
    said: tuple[GradedGeneration, ...] = rows("its completions of the forget questions")


@dataclasses.dataclass(frozen=True)
class Retrained:
    """The retrained model and what was measured of it."""

    model: LanguageModel
    params: Params
    measures: RetrainedMeasures

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint


def measure(
    run: Run, weights: Weights, questions: QuestionSet, retrained: Retrained | None
) -> Measures:
    """Stage: what is reported of weights of a run."""
    return _measured(run, run.params(weights), questions, retrained)[0]


def measure_retrained(run: Run, model: LanguageModel, questions: QuestionSet) -> RetrainedMeasures:
    """Stage: what is reported of the retrained model."""
    params = model.load_params()
    measures, generations = _measured(run, params, questions, None, model)
    asked = questions.of("forget")
    ratios = truth_ratios(run.workspace.scorer, params, model.chat, asked)
    said = tuple(g for g in generations if g.split == "forget")
    return RetrainedMeasures(measures, tuple(ratios.tolist()), said)


def _measured(
    run: Run,
    params: Params,
    questions: QuestionSet,
    retrained: Retrained | None,
    model: LanguageModel | None = None,
) -> tuple[Measures, tuple[GradedGeneration, ...]]:
    generations = generate_graded(run, "think", "evaluation", params, questions, model)
    scores = Scores.from_graded(generations, questions.words)
    forget = questions.only("forget")

    def attacked(attack: Literal["zero", "less"]) -> float | None:
        title = f"{attack.capitalize()}Think"
        found = generate_graded(run, attack, title, params, forget, model, attack)
        _write_generations(run, attack, found)
        return leak_rate(found)

    _write_generations(run, "think", generations)
    zero, less = attacked("zero"), attacked("less")
    ks = kl = None
    if retrained is not None:
        scorer, gold = run.workspace.scorer, retrained.measures
        chat, asked = run.workspace.model.chat, questions.of("forget")
        own = truth_ratios(scorer, params, chat, asked)
        ks = forget_quality(own, np.array(gold.ratios))
        ks = None if np.isnan(ks) else ks  # There are no wrong answers to compare with.
        said = [
            TokenizedExample(q.prompt_ids, g.ids) for q, g in zip(asked, gold.said, strict=True)
        ]
        kl = divergence(scorer, params, retrained.params, said)
    measures = Measures(
        cot_leak=scores.forget.cot_leak if scores.forget else None,
        answer_leak=scores.forget.answer_leak if scores.forget else None,
        think_completion=scores.forget.think_completion if scores.forget else None,
        retain=scores.retain.accuracy if scores.retain else None,
        reasoning=scores.reasoning.accuracy if scores.reasoning else None,
        zero_leak=zero,
        less_leak=less,
        ks=ks,
        kl=kl,
    )
    return measures, generations


def _write_generations(run: Run, name: str, generations: tuple[GradedGeneration, ...]) -> None:
    """evals/NAME.jsonl of the run: every question, what was said, what leaked."""
    write_records(run.folder / "evals" / f"{run.stage_name}-{name}.jsonl", generations)
