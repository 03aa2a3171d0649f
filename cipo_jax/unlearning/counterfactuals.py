"""Counterfactual traces: other answers, the reasoning that leads to them, and what is accepted.

The model to be unlearned writes them itself (CiPO, arXiv 2604.15847): it names another answer
unless the user gives one, then reasons backward to it. Of several candidates the best that passes
every check is kept: it closes its think block, reaches the target answer, never mentions a
forgotten fact, is not degenerate, and makes the target answer more likely to the model itself than
it is without the trace.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from cipo_jax.data.batches import TokenizedExample, shape_of
from cipo_jax.data.examples import Example
from cipo_jax.errors import UserError
from cipo_jax.sampling.decode import SamplingParams
from cipo_jax.sampling.sampler import Request, rules_of
from cipo_jax.text.matching import normalized_words, reveals
from cipo_jax.typing import Array, Params
from cipo_jax.unlearning.engine import Engine
from cipo_jax.unlearning.run_folder import Row

_REPEATS = 3  # a run of four words may occur so often in a trace


@dataclasses.dataclass
class _Item:
    """One forget question on its way to a counterfactual."""

    index: int
    example: Example
    target: str | None
    source: str  # who chose the target: "given", "strategy" or "model"
    named: Row | None = None  # the completion that named the target, where it was asked for
    accepted: Row | None = None
    rejected: list[Row] = dataclasses.field(default_factory=list)


def counterfactuals_stage(
    engine: Engine, model: Callable[[], Params], name: str = "counterfactuals"
) -> list[Row]:
    """NAME.jsonl: the model's own traces to other answers, made once.

    Args:
      engine: of the run.
      model: gives the model to be unlearned.
      name: of the stage and the file; another name draws other numbers.
    """
    folder = engine.folder

    def make() -> Row:
        rows = make_counterfactuals(engine, model(), name)
        folder.write_rows(f"{name}.jsonl", rows)
        without = [row["question"] for row in rows if not row["accepted"]]
        drawn = sum(row["accepted"] + len(row["rejected"]) for row in rows)
        return {"questions": len(rows), "candidates": drawn, "without_trace": without}

    result = folder.once(name, make, [f"{name}.jsonl"])
    found = result["questions"] - len(result["without_trace"])
    engine.reporter.line(
        f"{name}: {found} of {result['questions']} questions have a valid trace "
        f"({result['candidates']} candidates)"
    )
    for question in result["without_trace"]:
        engine.reporter.line(f"  none for: {question}")
    return folder.read_rows(f"{name}.jsonl")


def make_counterfactuals(
    engine: Engine, params: Params, name: str = "counterfactuals"
) -> list[Row]:
    """Writes a counterfactual for each forget question, as far as the model manages to.

    Args:
      engine: of the run; its config.counterfactual says how.
      params: the model to be unlearned, training layout.
      name: of the stage; another name draws other numbers.

    Returns:
      One row per question; "accepted" tells whether it has a trace.

    Raises:
      UserError: where no question at all has one.
    """
    settings = engine.config.counterfactual
    items = [_start(engine, i, e) for i, e in enumerate(engine.splits.forget)]
    for attempt in range(settings.rounds):
        if all(item.accepted for item in items):
            break
        _try(engine, params, items, name, attempt)
    if not any(item.accepted for item in items):
        why = items[0].rejected[0]["why"][0] if items[0].rejected else "no target answer was found"
        raise UserError(
            f"counterfactuals: not one of {len(items)} questions got a valid trace (the first: "
            f"{why}); look at config.counterfactual, its prompts and its candidates"
        )
    return [_row(engine, item) for item in items]


def written_examples(
    engine: Engine, params: Params, examples: Sequence[Example], name: str
) -> list[Row]:
    """How a model writes counterfactuals, as examples to learn from: prompts and completions.

    Args:
      engine: of the run; its config.counterfactual says how.
      params: a model that can do it.
      examples: whom they are about.
      name: of the stage; another name draws other numbers.

    Returns:
      Rows {"about": the question, "question": the prompt, "cot", "answer"}, two for each example
      that came out well: naming another answer, where the model does so and thinks about it, and
      reasoning to it.
    """
    items = [_start(engine, i, e) for i, e in enumerate(examples)]
    _try(engine, params, items, name, 0)
    rows = []
    for item in items:
        for prompt, row in (
            (_target_prompt(engine, item), item.named),
            (_trace_prompt(engine, item), item.accepted),
        ):
            if item.accepted is not None and row is not None and row["cot"].strip():
                example = {"about": item.example.question, "question": prompt}
                rows.append(example | {k: row[k] for k in ("cot", "answer")})
    return rows


def _try(engine: Engine, params: Params, items: Sequence[_Item], name: str, attempt: int) -> None:
    """Targets and traces for the items that have no trace yet."""
    _choose_targets(engine, params, items, name, attempt)
    ready = [item for item in items if item.accepted is None and item.target is not None]
    candidates = _draw_traces(engine, params, ready, name, attempt)
    _accept(engine, params, ready, candidates)


def _start(engine: Engine, index: int, example: Example) -> _Item:
    settings = engine.config.counterfactual
    fixed = {"boundary": settings.boundary_answer, "refusal": settings.refusal_answer}
    if settings.strategy in fixed:
        return _Item(index, example, fixed[settings.strategy], "strategy")
    if example.target_answer is None:
        return _Item(index, example, None, "model")
    leaked = [f for f in example.forbidden if reveals(example.target_answer, f, example.question)]
    if leaked:
        raise UserError(
            f"forget row {index + 1}: field 'target_answer' = {example.target_answer!r} mentions "
            f"{leaked[0]!r}, which is to be forgotten; choose another"
        )
    return _Item(index, example, example.target_answer, "given")


def _requests(engine: Engine, items: Sequence[_Item], prompts: Sequence[str]) -> list[Request]:
    encode = engine.model.format.prompt_ids
    return [Request(encode(p), i.index) for p, i in zip(prompts, items, strict=True)]


def _key(engine: Engine, name: str, what: str, attempt: int) -> Array:
    own = () if name == "counterfactuals" else (name,)
    return engine.key(*own, what, attempt)


def _rules(engine: Engine) -> SamplingParams:
    settings = engine.config.counterfactual
    limit = engine.config.sampling.max_new_tokens
    return rules_of(engine.model.format, limit, settings.temperature, settings.top_p)


def _choose_targets(
    engine: Engine, params: Params, items: Sequence[_Item], name: str, attempt: int
) -> None:
    """Has the model name another answer for each group of questions that lacks one.

    Questions of one group get the same target, so that what the model learns to say is consistent.
    In a later round a group of which no question has found a trace is given a new target.
    """
    settings = engine.config.counterfactual
    groups: dict[str, list[_Item]] = {}
    for item in items:
        if item.source == "model":
            groups.setdefault(item.example.group or item.example.question, []).append(item)
    wanting = [g for g in groups.values() if not any(item.accepted for item in g)]
    leaders = [group[0] for group in wanting]
    prompts = [_target_prompt(engine, leader) for leader in leaders]
    drawn = engine.sample_rows(
        f"{name}/targets-{attempt}",
        f"target answers, try {attempt + 1}",
        params,
        _requests(engine, leaders, prompts),
        _rules(engine),
        _key(engine, name, "targets", attempt),
        settings.candidates,
    )
    for group, candidates in zip(wanting, drawn, strict=True):
        tried = {item.target for item in group}
        forbidden = [(f, item.example.question) for item in group for f in item.example.forbidden]
        named = next(
            (
                c
                for c in candidates
                if c["closed"]
                and c["stopped"]
                and normalized_words(c["answer"])
                and len(normalized_words(c["answer"])) <= settings.max_target_words
                and c["answer"] not in tried
                and not any(reveals(c["answer"], f, asked) for f, asked in forbidden)
            ),
            None,
        )
        if named is not None:
            group[0].named = named
            for item in group:
                item.target = named["answer"]


def _target_prompt(engine: Engine, item: _Item) -> str:
    template, example = engine.config.counterfactual.target_prompt, item.example
    return template.format(question=example.question, answer=example.answer)


def _trace_prompt(engine: Engine, item: _Item) -> str:
    settings = engine.config.counterfactual
    template = getattr(settings, f"{settings.strategy}_prompt")
    return template.format(question=item.example.question, answer=item.target)


def _draw_traces(
    engine: Engine, params: Params, items: Sequence[_Item], name: str, attempt: int
) -> list[list[Row]]:
    settings = engine.config.counterfactual
    prompts = [_trace_prompt(engine, item) for item in items]
    return engine.sample_rows(
        f"{name}/traces-{attempt}",
        f"{name}, try {attempt + 1}",
        params,
        _requests(engine, items, prompts),
        _rules(engine),
        _key(engine, name, "traces", attempt),
        settings.candidates,
    )


def text_faults(
    candidate: Row, example: Example, target: str, min_distinct: float, min_words: int = 3
) -> list[str]:
    """Why the text of a candidate cannot be accepted; empty where it can.

    Args:
      candidate: {"cot", "answer", "closed", "stopped"}.
      example: the forget question.
      target: the answer that the trace should lead to.
      min_distinct: distinct words / words of the trace, at least.
      min_words: of the trace, at least; 1 or more.
    """
    faults = []
    if not candidate["closed"]:
        faults.append("does not close its think block")
    elif not candidate["stopped"]:
        faults.append("does not end")
    if candidate["closed"] and not reveals(candidate["answer"], target, example.question):
        faults.append(f"does not reach the target answer {target!r}")
    for fact in example.forbidden:
        if any(reveals(candidate[part], fact, example.question) for part in ("cot", "answer")):
            faults.append(f"mentions the forgotten {fact!r}")
    words = normalized_words(candidate["cot"])
    if len(words) < min_words:
        faults.append("degenerate: hardly a word of reasoning")
    elif len(set(words)) / len(words) < min_distinct:
        faults.append("degenerate: repeats its words")
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if runs and max(map(runs.count, runs)) > _REPEATS:
        faults.append("degenerate: repeats a phrase")
    return faults


def _accept(
    engine: Engine, params: Params, items: Sequence[_Item], candidates: Sequence[list[Row]]
) -> None:
    """Scores what passes the checks on text, and keeps the best of each question."""
    settings = engine.config.counterfactual
    passed: list[tuple[_Item, Row]] = []
    for item, drawn in zip(items, candidates, strict=True):
        assert item.target is not None
        seen: set[str] = set()
        for candidate in drawn:
            text = f"{candidate['cot']}\n{candidate['answer']}"
            faults = text_faults(candidate, item.example, item.target, settings.min_distinct)
            if text in seen:
                faults.append("the same text as another candidate")
            seen.add(text)
            if faults:
                item.rejected.append(_rejection(candidate, item.target, faults))
            else:
                passed.append((item, candidate))
    scored = _consistency(engine, params, passed)
    best: dict[int, tuple[_Item, Row]] = {}
    for (item, candidate), (gain, style) in zip(passed, scored, strict=True):
        candidate |= {"gain": gain, "style": style}
        if gain < settings.min_gain:
            why = f"inconsistent: raises log p(target answer) by {gain:.2f} nats only"
            item.rejected.append(_rejection(candidate, item.target, [why]))
            continue
        held = best.get(item.index)
        if held is not None:
            worse = min(held[1], candidate, key=lambda c: c["style"])
            item.rejected.append(_rejection(worse, item.target, ["another candidate reads better"]))
            if worse is candidate:
                continue
        best[item.index] = (item, candidate)
    for item, candidate in best.values():
        item.accepted = candidate


def _rejection(candidate: Row, target: str | None, why: list[str]) -> Row:
    kept = {"target_answer": target, "trace": candidate["cot"], "answer": candidate["answer"]}
    return kept | {"why": why}


def _consistency(
    engine: Engine, params: Params, passed: Sequence[tuple[_Item, Row]]
) -> list[tuple[float, float]]:
    """For each candidate (gain, style), in nats.

    gain: log p(answer | question, trace) - log p(answer | question, empty think block).
    style: mean log-probability of the trace's tokens where the model is asked the plain question.
    """
    if not passed:
        return []
    format = engine.model.format
    with_trace, without = [], []
    starts = []
    for item, candidate in passed:
        prompt = format.prompt_ids(item.example.question)
        ids = candidate["ids"]
        start = format.answer_start(ids)
        assert start is not None
        starts.append(start)
        with_trace.append(TokenizedExample(prompt, ids))
        without.append(TokenizedExample(prompt, [*format.close_ids, *ids[start:]]))
    limit = engine.config.sampling.max_new_tokens
    longest = max(with_trace, key=lambda row: len(row.prompt))
    shape = shape_of([TokenizedExample(longest.prompt, [0] * limit)])
    traced = engine.scorer.token_logps(params, with_trace, shape)
    plain = engine.scorer.token_logps(params, without, shape)
    results = []
    for logps, bare, start in zip(traced, plain, starts, strict=True):
        gain = logps[start:].sum() - bare[len(format.close_ids) :].sum()
        results.append((float(gain), float(logps[:start].mean())))
    return results


def _row(engine: Engine, item: _Item) -> Row:
    """A line of counterfactuals.jsonl."""
    accepted: dict[str, Any] = item.accepted or {}
    checks = ("closes_think", "reaches_target", "forgets", "not_degenerate", "consistent")
    return {
        "item": item.index,
        "question": item.example.question,
        "true_answer": item.example.answer,
        "target_answer": item.target,
        "target_source": item.source,
        "strategy": engine.config.counterfactual.strategy,
        "accepted": item.accepted is not None,
        "trace": accepted.get("cot"),
        "answer": accepted.get("answer"),
        "checks_passed": list(checks) if item.accepted is not None else [],
        "consistency_gain": accepted.get("gain"),
        "trace_logp": accepted.get("style"),
        "completion_ids": accepted.get("ids"),
        "rejected": item.rejected,
    }
