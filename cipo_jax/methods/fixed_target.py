"""Methods that are one loss on fixed data: their loop and their entries.

Rounds of the loss on the same rows; each is validated, and the best by validation is kept.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np

from cipo_jax.data.batches import PadShape, TokenizedExample, collate, shuffled_batches
from cipo_jax.data.records import Record, field
from cipo_jax.errors import UserError
from cipo_jax.methods.base import Method, given
from cipo_jax.methods.batches import nothing_retained, retained_batches
from cipo_jax.methods.objective import FixedTargetObjective, ForgetLoss
from cipo_jax.methods.retain import (
    HiddenRetain,
    KdRetain,
    KlRetain,
    NllRetain,
    NoRetain,
    RetainTerm,
    completion_nll,
)
from cipo_jax.methods.targets import Target, TargetBuilder, original_completions
from cipo_jax.models.decoder import DecoderConfig
from cipo_jax.models.trainable import Trainable
from cipo_jax.runs.context import Run, iteration_name
from cipo_jax.runs.data import RetainedExamples
from cipo_jax.runs.evaluation import IterationRecord, Result, converged, select, validated
from cipo_jax.runs.identity import derive_seed
from cipo_jax.runs.measurement import Measurement
from cipo_jax.runs.results import StageResult, rows
from cipo_jax.runs.training import Batches, num_steps, optimize
from cipo_jax.runs.weights import Weights
from cipo_jax.settings import setting
from cipo_jax.shared_config import CounterfactualConfig, RunConfig
from cipo_jax.training.objective import Batch, Metrics, StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params

RetainName = Literal["none", "nll", "kl", "kd", "hidden"]
Span = Literal["both", "cot", "answer"]
HIDDEN_LAYER = 7  # As in RMU's code, for a model of 32 layers.


@dataclasses.dataclass(frozen=True)
class FixedTargetConfig:
    """The loop of every method but CiPO, and how it retains facts and reasoning."""

    rounds: int = setting(
        2, "rounds of train.epochs epochs; each is validated and the best is kept", 1
    )
    span: Literal["both", "cot", "answer"] = setting(
        "both", "tokens of a forget completion that the forget loss acts on"
    )
    forget_weight: float | None = setting(
        None, "weight of the forget loss; None for the method's own", 0.0
    )
    retain: Literal["none", "nll", "kl", "kd", "hidden"] | None = setting(
        None,
        "the retain loss: none, NLL of the data, KL or distillation from the base parameters, or "
        "distance to their hidden states; None for the method's own",
    )
    retain_weight: float | None = setting(
        None, "weight of the retain loss; None for the method's own", 0.0
    )
    temperature: float = setting(1.0, 'temperature of distillation in retain="kd"', 0.01)
    layer: int | None = setting(
        None,
        'layer whose output retain="hidden" matches, from 0; None for 7, or representation.layer',
        0,
    )


@dataclasses.dataclass(frozen=True)
class ImitateTarget(ForgetLoss):
    """NLL of the targets."""

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        del context
        loss = completion_nll(policy, params, batch["target"])
        return loss, {"target/nll": loss}


@dataclasses.dataclass(frozen=True)
class FixedTarget(Method):
    """A method that is a forget loss and a retain term on fixed data.

    Attributes:
      loss: the forget loss, from the config.
      targets: completions that the loss gets as batch["target"]; None for none.
      retain: the retain term, unless config.fixed_target.retain sets one.
      forget_weight: unless config.fixed_target.forget_weight sets one.
      retain_weight: unless config.fixed_target.retain_weight sets one.
    """

    loss: Callable[[RunConfig], ForgetLoss] = dataclasses.field(kw_only=True)
    targets: TargetBuilder | None = None
    retain: RetainName = "nll"
    forget_weight: float = 1.0
    retain_weight: float = 1.0

    def run(self, run: Run, measurement: Measurement) -> Result:
        """Rounds of the loss on fixed rows, until validation is clean or the budget is spent."""
        config, data = run.config, run.workspace.data
        before = measurement.before(run)
        originals = original_completions(run)
        targets = None if self.targets is None else self.targets.build(run, originals)
        objective = self.objective(config)
        span, logps = config.group(FixedTargetConfig).span, objective.forget.needs_reference_logps
        prepared = run.stage("pairs", prepare_rows, run.base, originals, targets, span, logps)
        retained = data.retained if objective.retain.uses_data else None
        weights, history = run.base, list[IterationRecord]()
        for number in range(1, config.group(FixedTargetConfig).rounds + 1):
            it = run.at(f"iterations/{number:02d}")
            weights = it.stage("train", train_round, weights, prepared, retained, self, number)
            history.append(validated(it, weights, number))
            run.drop_weights_before(number, keep=select(history).iteration)
            if converged(history, config.selection):
                break
        return measurement.after(run, before, history)

    @property
    def fingerprint(self) -> str:
        """Of the method as an input of stages; its settings are those of the config."""
        return self.name

    def objective(self, config: RunConfig) -> FixedTargetObjective:
        """The objective of a config's settings."""
        settings = config.group(FixedTargetConfig)
        term, weight = self.retain_term(config)
        forget_weight = given(settings.forget_weight, self.forget_weight)
        return FixedTargetObjective(self.loss(config), term, forget_weight, weight)

    def retain_term(self, config: RunConfig) -> tuple[RetainTerm, float]:
        """The retain term and its weight."""
        settings = config.group(FixedTargetConfig)
        weight = given(settings.retain_weight, self.retain_weight)
        name = settings.retain or self.retain
        if name == "hidden":
            return hidden_term(*self.hidden_settings(config), weight)
        terms: dict[str, RetainTerm] = {
            "none": NoRetain(),
            "nll": NllRetain(),
            "kl": KlRetain(),
            "kd": KdRetain(settings.temperature),
        }
        return terms[name], weight

    def hidden_settings(self, config: RunConfig) -> tuple[int, float]:
        """Of retain="hidden": the layer, and the weight of reasoning."""
        layer = config.group(FixedTargetConfig).layer
        return (HIDDEN_LAYER if layer is None else layer), 1.0

    def needs_reference_params(self, config: RunConfig) -> bool:
        return self.objective(config).needs_reference_params

    def retains(self, config: RunConfig) -> bool:
        return self.objective(config).retain.uses_data

    def trainable(self, config: RunConfig, decoder: DecoderConfig) -> Trainable:
        self.check_hidden_layer(config, decoder)
        return super().trainable(config, decoder)

    def check_hidden_layer(self, config: RunConfig, decoder: DecoderConfig) -> None:
        """Raises UserError where the retain term matches a layer that the model does not have."""
        term = self.objective(config).retain
        if isinstance(term, HiddenRetain) and term.layer >= decoder.layers:
            raise UserError(
                f"config.fixed_target.layer = {term.layer}: the model has layers 0 to "
                f"{decoder.layers - 1}"
            )

    def trace_settings(self, config: RunConfig) -> CounterfactualConfig | None:
        return None if self.targets is None else self.targets.trace_settings(config)


def hidden_term(layer: int, reasoning_weight: float, weight: float) -> tuple[RetainTerm, float]:
    """Facts have the weight `weight`, and reasoning one of its own, as in R2MU."""
    if not weight:
        return HiddenRetain(layer, (0.0, reasoning_weight)), 1.0
    return HiddenRetain(layer, (1.0, reasoning_weight / weight)), weight


# ---- the rows of the loss


@dataclasses.dataclass(frozen=True)
class FixedRow(Record):
    """Forget completion and target of a forget question."""

    schema: ClassVar[str] = "fixed_row"
    stored_in: ClassVar[tuple[str, ...]] = ("pairs.jsonl",)

    item: int = field("index of the forget question")
    question: str = field("the question")
    forget_prompt_ids: tuple[int, ...] = field("tokens before what the loss acts on")
    forget_ids: tuple[int, ...] = field("tokens to forget")
    target_prompt_ids: tuple[int, ...] | None = field("tokens before the target; null for none")
    target_ids: tuple[int, ...] | None = field("tokens of the target; null for none")
    ref_forget_logp: float | None = field("log p(tokens to forget) under the base, in nats")
    ref_target_logp: float | None = field("log p(target) under the base, in nats")

    @property
    def forget(self) -> TokenizedExample:
        return TokenizedExample(self.forget_prompt_ids, self.forget_ids)

    @property
    def target(self) -> TokenizedExample | None:
        if self.target_ids is None or self.target_prompt_ids is None:
            return None
        return TokenizedExample(self.target_prompt_ids, self.target_ids)


@dataclasses.dataclass(frozen=True)
class FixedRows(StageResult):
    """The rows of a run."""

    schema: ClassVar[str] = "fixed_rows"

    rows: tuple[FixedRow, ...] = rows("one a question, or a question and target")

    def forget(self) -> list[TokenizedExample]:
        """The completions to forget."""
        return [row.forget for row in self.rows]

    def target(self) -> list[TokenizedExample]:
        """The targets; [] where there are none."""
        return [target for row in self.rows if (target := row.target) is not None]


def prepare_rows(
    run: Run,
    base: Weights,
    originals: Sequence[TokenizedExample],
    targets: Sequence[Target] | None,
    span: Span,
    reference_logps: bool,
) -> FixedRows:
    """Stage: the rows of the loss, with log-probabilities under the base parameters."""
    questions = run.workspace.data.forget.questions
    if targets is None:
        chosen: list[tuple[int, TokenizedExample | None]] = [
            (i, None) for i in range(len(originals))
        ]
    else:
        chosen = [(target.item, target.tokens) for target in targets]
    made = []
    for item, target in chosen:
        forget = _spanned(run, originals[item], span)
        made.append(
            FixedRow(
                item=item,
                question=questions[item].example.question,
                forget_prompt_ids=tuple(forget.prompt),
                forget_ids=tuple(forget.completion),
                target_prompt_ids=None if target is None else tuple(target.prompt),
                target_ids=None if target is None else tuple(target.completion),
                ref_forget_logp=None,
                ref_target_logp=None,
            )
        )
    found = FixedRows(tuple(made))
    return _with_reference_logps(run, base, found) if reference_logps else found


def _spanned(run: Run, original: TokenizedExample, span: Span) -> TokenizedExample:
    """The part of a completion that a loss acts on; what comes before it joins the prompt."""
    prompt, completion = list(original.prompt), list(original.completion)
    start = run.workspace.model.chat.answer_start(completion)
    if span == "both" or start is None:  # A thought that is never closed is all there is.
        return original
    if span == "cot":
        return TokenizedExample(prompt, completion[:start])
    return TokenizedExample(prompt + completion[:start], completion[start:])


def _with_reference_logps(run: Run, base: Weights, found: FixedRows) -> FixedRows:
    params, scorer = run.params(base), run.workspace.scorer

    def sums(examples: list[TokenizedExample]) -> list[float] | list[None]:
        if not examples:
            return [None] * len(found.rows)
        shape = PadShape.fitting(examples)
        return [float(logps.sum()) for logps in scorer.token_logps(params, examples, shape)]

    logps = zip(found.rows, sums(found.forget()), sums(found.target()), strict=True)
    return FixedRows(
        tuple(
            dataclasses.replace(row, ref_forget_logp=forget, ref_target_logp=target)
            for row, forget, target in logps
        )
    )


# ---- a round


def train_round(
    run: Run,
    start: Weights,
    rows: FixedRows,
    retained: RetainedExamples | None,
    method: FixedTarget,
    number: int,
) -> Weights:
    """Stage: one round, train.epochs over the rows."""
    settings = run.config.train
    batches = _batches(run, rows, retained, number)
    title = f"iteration {number}: {method.name}"
    objective = method.objective(run.config)
    return optimize(run, iteration_name(number), title, start, objective, settings, batches)


def _batches(run: Run, rows: FixedRows, retained: RetainedExamples | None, number: int) -> Batches:
    settings, seed = run.config.train, run.config.seed
    order = shuffled_batches(len(rows.rows), settings.batch_size, derive_seed(seed, number, 0))
    sides = {"forget": rows.forget(), "target": rows.target()}
    shapes = {name: PadShape.fitting(side) for name, side in sides.items() if side}
    refs = {
        "ref_forget": [row.ref_forget_logp for row in rows.rows],
        "ref_target": [row.ref_target_logp for row in rows.rows],
    }
    kept = nothing_retained
    if retained is not None:
        kept = retained_batches(retained, settings, seed, number)

    def at(step: int) -> Batch:
        picked = order(step)
        batch: Batch = {
            name: collate([sides[name][i] for i in picked], shape) for name, shape in shapes.items()
        }
        for name, logps in refs.items():
            if logps[0] is not None:
                batch[name] = np.array([logps[i] for i in picked], np.float32)
        return batch | kept(step)

    return Batches(at, num_steps(settings, len(rows.rows)))
