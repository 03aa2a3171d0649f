"""Rollouts and preference pairs of an iteration."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from cipo_jax.data.batches import PadShape, TokenizedExample
from cipo_jax.data.records import Record, field
from cipo_jax.evals.leakage import leaks, share
from cipo_jax.methods.cipo.config import CipoConfig
from cipo_jax.methods.counterfactual_records import Counterfactuals
from cipo_jax.runs.context import Run
from cipo_jax.runs.evaluation import RolloutStats
from cipo_jax.runs.generation import sample_generations
from cipo_jax.runs.results import StageResult, rows
from cipo_jax.runs.weights import Weights
from cipo_jax.sampling.job import Request, SamplingJob
from cipo_jax.sampling.params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Rollout(Record):
    """A completion of a forget question by the current model."""

    schema: ClassVar[str] = "rollout"
    stored_in: ClassVar[tuple[str, ...]] = ("iterations/NN/rollouts.jsonl",)

    item: int = field("index of the forget question")
    sample: int = field("number among the samples of the question")
    question: str = field("the question")
    cot: str = field("chain of thought; all the text where the think block was not closed")
    answer: str = field("text after the think block")
    closed: bool = field("whether the think block was closed")
    stopped: bool = field("whether it ended with a stop token")
    cot_leaks: tuple[str, ...] = field("forbidden strings that the chain of thought reveals")
    answer_leaks: tuple[str, ...] = field("forbidden strings that the answer reveals")
    ids: tuple[int, ...] = field("token ids, the stop token included")

    @property
    def clean(self) -> bool:
        """Whether it closes its think block and reveals nothing."""
        return self.closed and not (self.cot_leaks or self.answer_leaks)


@dataclasses.dataclass(frozen=True)
class Rollouts(StageResult):
    """The rollouts of an iteration."""

    schema: ClassVar[str] = "rollouts"

    stats: RolloutStats = field("their leak rates")
    rollouts: tuple[Rollout, ...] = rows("samples of a question stand together")


@dataclasses.dataclass(frozen=True)
class Completion(Record):
    """One side of a pair."""

    cot: str = field("chain of thought")
    answer: str = field("answer")
    ids: tuple[int, ...] = field("token ids, the stop token included")
    ref_logp: float | None = field("log-probability under the reference, in nats; null for SimPO")


@dataclasses.dataclass(frozen=True)
class Pair(Record):
    """A counterfactual and a rollout of the same question."""

    schema: ClassVar[str] = "pair"
    stored_in: ClassVar[tuple[str, ...]] = ("iterations/NN/pairs.jsonl",)

    item: int = field("index of the forget question")
    sample: int = field("number of the rollout")
    question: str = field("the question")
    prompt_ids: tuple[int, ...] = field("token ids of the question's prompt")
    weight: float = field("of the preference loss: 0 where a clean rollout is not rejected")
    reference: str | None = field("the checkpoint of the reference; null for SimPO")
    chosen: Completion = field("the counterfactual")
    rejected: Completion = field("the rollout")

    def tokenized(self) -> tuple[TokenizedExample, TokenizedExample]:
        """Chosen and rejected as token ids."""
        return (
            TokenizedExample(self.prompt_ids, self.chosen.ids),
            TokenizedExample(self.prompt_ids, self.rejected.ids),
        )


@dataclasses.dataclass(frozen=True)
class Pairs(StageResult):
    """The pairs of an iteration."""

    schema: ClassVar[str] = "pairs"

    pairs: tuple[Pair, ...] = rows("one a rollout")


def pair_shape(run: Run) -> PadShape:
    """One padded shape for the pairs of all iterations: longest prompt, longest sample."""
    prompt = [0] * run.workspace.data.longest_forget_prompt
    completion = [0] * run.config.sampling.max_new_tokens
    return PadShape.fitting([TokenizedExample(prompt, completion)])


def sample_rollouts(run: Run, policy: Weights, traces: Counterfactuals, iteration: int) -> Rollouts:
    """Stage: completions of each forget question that has a counterfactual."""
    chat, settings = run.workspace.model.chat, run.config.sampling
    job = SamplingJob(
        [Request(c.prompt_ids, c.item) for c in traces.accepted],
        SamplingParams.from_config(settings, chat),
        run.key("rollouts", iteration),
        run.config.group(CipoConfig).num_samples,
    )
    title = f"iteration {iteration}: rollouts"
    drawn = sample_generations(run, "rollouts", title, run.params(policy), job)
    questions, found = run.workspace.data.forget.questions, []
    for generation in (g for samples in drawn for g in samples):
        example = questions[generation.item].example
        found.append(
            Rollout(
                item=generation.item,
                sample=generation.sample,
                question=example.question,
                cot=generation.cot,
                answer=generation.answer,
                closed=generation.closed,
                stopped=generation.stopped,
                cot_leaks=leaks(generation.cot, example),
                answer_leaks=leaks(generation.answer, example),
                ids=generation.ids,
            )
        )
    return Rollouts(_stats(found), tuple(found))


def _stats(rollouts: Sequence[Rollout]) -> RolloutStats:
    return RolloutStats(
        cot_leak=share([bool(r.cot_leaks) for r in rollouts]),
        answer_leak=share([bool(r.answer_leaks) for r in rollouts]),
        think_completion=share([r.closed for r in rollouts]),
        n=len(rollouts),
    )


def make_pairs(
    run: Run, traces: Counterfactuals, rollouts: Rollouts, reference: Weights | None
) -> Pairs:
    """Stage: a pair for each rollout: the question's counterfactual is chosen, it is rejected.

    With cipo.reject = "leaking" a clean rollout stays as a pair of weight 0: its counterfactual is
    still learnt, and the number of pairs, and with it of steps, is the same in every iteration.
    """
    pairs = pair_up(traces, rollouts, run.config.group(CipoConfig).reject)
    if reference is None:
        return Pairs(pairs)
    arrays = run.state.weights.get(reference)
    params = arrays.params if arrays.ema is None else arrays.ema
    assembled = run.workspace.model.assemble(params)
    sides = [side for pair in pairs for side in pair.tokenized()]
    logps = run.workspace.scorer.token_logps(assembled, sides, pair_shape(run))
    sums = [float(lp.sum()) for lp in logps]
    return Pairs(
        tuple(
            dataclasses.replace(
                pair,
                reference=reference.name,
                chosen=dataclasses.replace(pair.chosen, ref_logp=sums[2 * i]),
                rejected=dataclasses.replace(pair.rejected, ref_logp=sums[2 * i + 1]),
            )
            for i, pair in enumerate(pairs)
        )
    )


def pair_up(traces: Counterfactuals, rollouts: Rollouts, reject: str) -> tuple[Pair, ...]:
    """The pairs without a reference; "all" rejects every rollout, "leaking" those not clean."""
    by_item = {c.item: c for c in traces.accepted}
    pairs = []
    for rollout in rollouts.rollouts:
        counterfactual = by_item[rollout.item]
        chosen = counterfactual.accepted
        assert chosen is not None
        pairs.append(
            Pair(
                item=rollout.item,
                sample=rollout.sample,
                question=rollout.question,
                prompt_ids=counterfactual.prompt_ids,
                weight=1.0 if reject == "all" or not rollout.clean else 0.0,
                reference=None,
                chosen=Completion(chosen.trace, chosen.answer, chosen.ids, None),
                rejected=Completion(rollout.cot, rollout.answer, rollout.ids, None),
            )
        )
    return tuple(pairs)
