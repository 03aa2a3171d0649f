"""Evaluates a model: greedy generations on each split, judged, and the scores of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from cipo_jax.data.examples import Example
from cipo_jax.data.think import ThinkFormat
from cipo_jax.evals.leakage import Row, accuracy_scores, forget_scores, judge
from cipo_jax.sampling.sampler import Request, Sampler, rules_of
from cipo_jax.typing import Params

Scores = dict[str, dict[str, float]]


def evaluation_batches(
    sampler: Sampler, format: ThinkFormat, splits: Mapping[str, Sequence[Example]]
) -> list[Any]:
    """The work of an evaluation, cut into batches that `generate_rows` takes.

    All splits share one prompt length, so that evaluating compiles one program.
    """
    prompts = {name: [format.prompt_ids(e.question) for e in rows] for name, rows in splits.items()}
    longest = max((len(p) for rows in prompts.values() for p in rows), default=1)
    batches = []
    for name, rows in splits.items():
        requests = [Request(prompt, i) for i, prompt in enumerate(prompts[name])]
        for batch, count in sampler.batches(requests):
            batches.append((name, longest, batch, [rows[r.item] for r in batch[:count]]))
    return batches


def generate_rows(
    sampler: Sampler, format: ThinkFormat, params: Params, max_new_tokens: int
) -> Callable[[Any], list[Row]]:
    """A function from one of `evaluation_batches` to its judged rows.

    Args:
      sampler: of the model.
      format: of the model.
      params: decoding layout.
      max_new_tokens: a generation that is not over by then has not closed its think block or has
        no end; either way it is judged as it stands.
    """
    from cipo_jax.data.batches import bucket

    rules = rules_of(format, max_new_tokens)

    def work(batch: Any) -> list[Row]:
        split, longest, requests, examples = batch
        key = jax.random.key(0)  # Greedy decoding draws nothing.
        completions = sampler.run(params, requests, rules, key, 1, bucket(longest))
        rows = []
        for example, (completion,) in zip(examples, completions, strict=False):
            row = judge(example, format.split(completion.ids), split)
            rows.append(row | {"tokens": len(completion.ids), "ids": completion.ids})
        return rows

    return work


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
