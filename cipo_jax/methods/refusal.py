"""Refusals as targets: direct_idk, answer_idk, reasoned_idk, tru."""

import dataclasses
from collections.abc import Sequence

from cipo_jax import losses
from cipo_jax.data.batches import TokenizedExample
from cipo_jax.data.readers import read_examples
from cipo_jax.errors import UserError
from cipo_jax.methods.base import register
from cipo_jax.methods.fixed_target import FixedTarget, ImitateTarget
from cipo_jax.methods.objective import ForgetLoss
from cipo_jax.methods.targets import Target, TargetBuilder, trace_targets
from cipo_jax.runs.context import Run
from cipo_jax.settings import setting
from cipo_jax.shared_config import CounterfactualConfig, RunConfig
from cipo_jax.training.objective import Batch, Metrics, StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class RefusalConfig:
    """Refusals as targets; TRU (arXiv 2603.09980) adds gradient ascent on the data."""

    alpha: float = setting(0.1, "TRU: weight of gradient ascent on the data", 0.0)
    path: str = setting(
        "",
        "TRU, reasoned_idk: source of forget questions with cot and answer, as data.forget; empty "
        "for refusals that the model writes",
    )


@dataclasses.dataclass(frozen=True)
class Tru(ForgetLoss):
    """Reasoned refusals are imitated, and the original is pushed away (arXiv 2603.09980).

    Attributes:
      alpha: weight of what pushes the original away.
    """

    alpha: float = 0.1

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        target, metrics = ImitateTarget()(policy, params, batch, context)
        forget = batch["forget"]
        logps = policy.completion_logps(params, forget)
        away, more = losses.ga(logps, forget.mask, num_tokens=forget.num_tokens)
        return target + self.alpha * away, metrics | more


@dataclasses.dataclass(frozen=True)
class RefusalTargets(TargetBuilder):
    """Reasoned refusals: those of a file, or written by the model."""

    def build(self, run: Run, originals: Sequence[TokenizedExample]) -> tuple[Target, ...]:
        del originals
        path = run.config.group(RefusalConfig).path
        if path:
            return _read_refusals(run, path)
        return trace_targets(run, "refusals", _refusing(run.config.counterfactual))

    def trace_settings(self, config: RunConfig) -> CounterfactualConfig | None:
        if config.group(RefusalConfig).path:
            return None
        return _refusing(config.counterfactual)


def _refusing(settings: CounterfactualConfig) -> CounterfactualConfig:
    return dataclasses.replace(settings, strategy="refusal")


def _read_refusals(run: Run, path: str) -> tuple[Target, ...]:
    chat = run.workspace.model.chat
    by_question = {e.question: e for e in read_examples(path, ("cot",))}
    found = []
    for item, question in enumerate(run.workspace.data.forget.questions):
        refusal = by_question.get(question.example.question)
        if refusal is not None:
            ids = chat.completion_ids(refusal.cot or "", refusal.answer)
            found.append(Target(item, TokenizedExample(question.prompt_ids, ids)))
    if not found:
        raise UserError(f"{path}: has none of the forget questions in its field 'question'")
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class IdkTargets(TargetBuilder):
    """An "I do not know" sentence as thought and answer."""

    def build(self, run: Run, originals: Sequence[TokenizedExample]) -> tuple[Target, ...]:
        idk = _idk(run)
        return tuple(
            Target(i, TokenizedExample(original.prompt, idk))
            for i, original in enumerate(originals)
        )


@dataclasses.dataclass(frozen=True)
class IdkAnswerTargets(TargetBuilder):
    """The thought stays, the answer is an "I do not know" sentence."""

    def build(self, run: Run, originals: Sequence[TokenizedExample]) -> tuple[Target, ...]:
        chat, idk = run.workspace.model.chat, _idk(run)
        start, found = chat.answer_start(idk), []
        for i, (prompt, completion) in enumerate(originals):
            end = chat.answer_start(completion)
            if end is not None:
                kept = [*prompt, *completion[:end]]
                found.append(Target(i, TokenizedExample(kept, idk[start:])))
        return tuple(found)


def _idk(run: Run) -> list[int]:
    sentence = run.config.counterfactual.boundary_answer
    return run.workspace.model.chat.completion_ids(sentence, sentence)


def _imitate(config: RunConfig) -> ImitateTarget:
    del config
    return ImitateTarget()


def _tru(config: RunConfig) -> Tru:
    return Tru(config.group(RefusalConfig).alpha)


register(
    FixedTarget(
        "direct_idk",
        "an IDK sentence as thought and answer",
        "2505.15214",
        loss=_imitate,
        targets=IdkTargets(),
    )
)
register(
    FixedTarget(
        "answer_idk",
        "the thought stays, the answer is IDK",
        "2505.15214",
        loss=_imitate,
        targets=IdkAnswerTargets(),
    )
)
register(
    FixedTarget(
        "reasoned_idk",
        "a thought that ends in not knowing",
        "2505.15214",
        loss=_imitate,
        targets=RefusalTargets(),
    )
)
register(
    FixedTarget(
        "tru",
        "reasoned refusals, and the original pushed away",
        "2603.09980",
        loss=_tru,
        targets=RefusalTargets(),
        retain_weight=0.1,
    )
)
