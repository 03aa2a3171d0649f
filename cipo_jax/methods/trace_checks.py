"""Checks on counterfactual traces: of their text, and of their log-probabilities."""

import dataclasses
from collections.abc import Sequence

from cipo_jax.data.batches import PadShape, TokenizedExample
from cipo_jax.data.examples import Example
from cipo_jax.evals.evaluate import Question
from cipo_jax.methods.counterfactual_records import AcceptedTrace, RejectedTrace
from cipo_jax.runs.context import Run
from cipo_jax.runs.generation import Generation
from cipo_jax.shared_config import CounterfactualConfig
from cipo_jax.text.matching import max_phrase_count, normalized_words, reveals
from cipo_jax.typing import Params

_PHRASE_WORDS, _REPEATS = 4, 3  # A run of four words may occur so often in a trace.


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A trace that was drawn for a question.

    Attributes:
      question: the plain question.
      target: the answer that the trace should lead to.
      generation: the candidate.
    """

    question: Question
    target: str
    generation: Generation

    def rejected(self, why: Sequence[str]) -> RejectedTrace:
        g = self.generation
        return RejectedTrace(self.target, g.cot, g.answer, tuple(why))


def text_faults(
    generation: Generation, example: Example, target: str, min_distinct: float, min_words: int = 3
) -> list[str]:
    """Why the text of a candidate cannot be accepted; empty where it can.

    Args:
      generation: the candidate.
      example: the forget question.
      target: the answer that the trace should lead to.
      min_distinct: distinct words / words of the trace, at least.
      min_words: of the trace, at least; 1 or more.
    """
    faults = []
    if not generation.closed:
        faults.append("does not close its think block")
    elif not generation.stopped:
        faults.append("does not end")
    if generation.closed and not reveals(generation.answer, target, example.question):
        faults.append(f"does not reach the target answer {target!r}")
    texts = (generation.cot, generation.answer)
    for fact in example.forbidden:
        if any(reveals(text, fact, example.question) for text in texts):
            faults.append(f"mentions the forgotten {fact!r}")
    words = normalized_words(generation.cot)
    if len(words) < min_words:
        faults.append("degenerate: hardly a word of reasoning")
    elif len(set(words)) / len(words) < min_distinct:
        faults.append("degenerate: repeats its words")
    if max_phrase_count(words, _PHRASE_WORDS) > _REPEATS:
        faults.append("degenerate: repeats a phrase")
    return faults


def judge(
    run: Run,
    params: Params,
    candidates: Sequence[Sequence[Candidate]],
    settings: CounterfactualConfig,
) -> list[tuple[AcceptedTrace | None, list[RejectedTrace], Generation | None]]:
    """For the candidates of each question: the best that passes, and those rejected.

    Returns:
      (the trace that is kept, those rejected, the generation that is kept) of each question.
    """
    rejected: list[list[RejectedTrace]] = [[] for _ in candidates]
    passed: list[tuple[int, Candidate]] = []
    for index, drawn in enumerate(candidates):
        seen: set[str] = set()
        for candidate in drawn:
            g = candidate.generation
            text = f"{g.cot}\n{g.answer}"
            example = candidate.question.example
            faults = text_faults(g, example, candidate.target, settings.min_distinct)
            if text in seen:
                faults.append("the same text as another candidate")
            seen.add(text)
            if faults:
                rejected[index].append(candidate.rejected(faults))
            else:
                passed.append((index, candidate))
    scored = _consistency(run, params, [candidate for _, candidate in passed])
    best: dict[int, tuple[Candidate, float, float]] = {}
    for (index, candidate), (gain, style) in zip(passed, scored, strict=True):
        if gain < settings.min_gain:
            why = f"inconsistent: raises log p(target answer) by {gain:.2f} nats only"
            rejected[index].append(candidate.rejected([why]))
            continue
        held = best.get(index)
        if held is not None:
            worse = candidate if style < held[2] else held[0]
            rejected[index].append(worse.rejected(["another candidate reads better"]))
            if worse is candidate:
                continue
        best[index] = (candidate, gain, style)
    return [
        (_accepted(*best[i]), rejected[i], best[i][0].generation)
        if i in best
        else (None, rejected[i], None)
        for i in range(len(candidates))
    ]


def _accepted(candidate: Candidate, gain: float, style: float) -> AcceptedTrace:
    g = candidate.generation
    return AcceptedTrace(g.cot, g.answer, gain, style, g.ids)


def _consistency(
    run: Run, params: Params, candidates: Sequence[Candidate]
) -> list[tuple[float, float]]:
    """For each candidate (gain, style), in nats.

    gain: log p(answer | question, trace) - log p(answer | question, empty think block).
    style: mean log-probability of the trace's tokens where the model is asked the plain question.
    """
    if not candidates:
        return []
    workspace = run.workspace
    chat, scorer = workspace.model.chat, workspace.scorer
    with_trace, without, starts = [], [], []
    for candidate in candidates:
        prompt, ids = candidate.question.prompt_ids, candidate.generation.ids
        start = chat.answer_start(ids)
        assert start is not None
        starts.append(start)
        with_trace.append(TokenizedExample(prompt, ids))
        without.append(TokenizedExample(prompt, [*chat.close_ids, *ids[start:]]))
    longest = max(with_trace, key=lambda row: len(row.prompt)).prompt
    limit = run.config.sampling.max_new_tokens
    shape = PadShape.fitting([TokenizedExample(longest, [0] * limit)])
    traced = scorer.token_logps(params, with_trace, shape)
    plain = scorer.token_logps(params, without, shape)
    results = []
    for logps, bare, start in zip(traced, plain, starts, strict=True):
        gain = logps[start:].sum() - bare[len(chat.close_ids) :].sum()
        results.append((float(gain), float(logps[:start].mean())))
    return results
