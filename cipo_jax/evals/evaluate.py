"""Evaluates a model: greedy generations on each split, judged, and the scores of them."""

from collections.abc import Iterator, Sequence

import jax

from cipo_jax.data.examples import Example
from cipo_jax.evals.attacks import prefill_text
from cipo_jax.evals.leakage import Row, accuracy_scores, forget_scores, judge
from cipo_jax.sampling.sampler import Request, Sampler, rules_of
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.typing import Params

Scores = dict[str, dict[str, float]]


def judged(
    sampler: Sampler,
    format: ChatFormat,
    params: Params,
    questions: Sequence[tuple[str, Example]],
    max_new_tokens: int,
    prefill: str = "",
) -> Iterator[tuple[int, Row]]:
    """Asks questions and judges what is said, each as soon as it is over.

    Args:
      sampler: of the model.
      format: of the model.
      params: decoding layout.
      questions: the split that each belongs to, and the question.
      max_new_tokens: a generation that is not over by then has not closed its think block or has
        no end; either way it is judged as it stands.
      prefill: a text that completions begin with; see `evals.attacks`.

    Yields:
      (index of the question, its judged row).
    """
    rules = rules_of(format, max_new_tokens)
    given = format.text_ids(prefill_text(prefill, format.close)) if prefill else []
    requests = [
        Request(format.prompt_ids(e.question), i, prefill=given)
        for i, (_, e) in enumerate(questions)
    ]
    # Greedy decoding draws nothing.
    for completion in sampler.stream(params, requests, rules, jax.random.key(0)):
        split, example = questions[completion.item]
        row = judge(example, format.split([*given, *completion.ids]), split)
        yield completion.item, row | {"tokens": len(completion.ids), "ids": completion.ids}


def scores(rows: Sequence[Row], words: frozenset[str]) -> Scores:
    """{"forget": ..., "retain": ..., "reasoning": ...} of judged rows."""
    by_split = {
        name: [r for r in rows if r["split"] == name] for name in ("forget", "retain", "reasoning")
    }
    return {
        "forget": forget_scores(by_split["forget"], words),
        "retain": accuracy_scores(by_split["retain"]),
        "reasoning": accuracy_scores(by_split["reasoning"]),
    }
