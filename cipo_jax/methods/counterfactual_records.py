"""Records of counterfactual traces: accepted ones, and rejected ones with the reason."""

import dataclasses
from typing import ClassVar

from cipo_jax.data.batches import TokenizedExample
from cipo_jax.data.records import Record, field
from cipo_jax.runs.results import StageResult, rows


@dataclasses.dataclass(frozen=True)
class RejectedTrace(Record):
    """A candidate that was not accepted."""

    target_answer: str = field("the answer that it should lead to")
    trace: str = field("its chain of thought")
    answer: str = field("its answer")
    why: tuple[str, ...] = field("the checks that it failed")


@dataclasses.dataclass(frozen=True)
class AcceptedTrace(Record):
    """The candidate that is kept of a question."""

    trace: str = field("its chain of thought")
    answer: str = field("its answer")
    gain: float = field("nats by which the trace raises log p(answer)")
    style: float = field("mean log-probability of its tokens after the plain question, in nats")
    ids: tuple[int, ...] = field("its token ids, the stop token included")


@dataclasses.dataclass(frozen=True)
class Counterfactual(Record):
    """A forget question and its counterfactual, if it has one."""

    schema: ClassVar[str] = "counterfactual"
    stored_in: ClassVar[tuple[str, ...]] = ("counterfactuals.jsonl", "refusals.jsonl",
                                            "alternates-N.jsonl")  # fmt: skip

    item: int = field("index of the forget question")
    question: str = field("the question")
    true_answer: str = field("the true answer, to be forgotten")
    target_answer: str | None = field("the answer of the counterfactual; null where none was found")
    target_source: str = field('who chose it: "given" by the data, the "strategy", the "model"')
    strategy: str = field("config.counterfactual.strategy")
    prompt_ids: tuple[int, ...] = field("token ids of the plain question's prompt")
    accepted: AcceptedTrace | None = field("the trace that is kept; null for none")
    rejected: tuple[RejectedTrace, ...] = field("the candidates that were not kept")

    def tokenized(self) -> TokenizedExample:
        """The plain question and the trace that is kept, as token ids."""
        assert self.accepted is not None
        return TokenizedExample(self.prompt_ids, self.accepted.ids)


@dataclasses.dataclass(frozen=True)
class Counterfactuals(StageResult):
    """The counterfactuals of all forget questions."""

    schema: ClassVar[str] = "counterfactuals"

    candidates: int = field("traces that were drawn and judged")
    questions: tuple[Counterfactual, ...] = rows("one a forget question")

    @property
    def accepted(self) -> tuple[Counterfactual, ...]:
        """Those that have a trace."""
        return tuple(c for c in self.questions if c.accepted is not None)

    @property
    def without_trace(self) -> tuple[Counterfactual, ...]:
        """Those that have none."""
        return tuple(c for c in self.questions if c.accepted is None)
