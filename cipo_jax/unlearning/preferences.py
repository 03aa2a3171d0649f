"""Rollouts and counterfactuals to preference pairs, and pairs to batches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cipo_jax.config import TrainConfig
from cipo_jax.data.batches import Shape, TokenizedExample, collate, shape_of, shuffled_batches
from cipo_jax.data.examples import Example
from cipo_jax.sampling.sampler import Request, rules_of_settings
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.text.matching import reveals
from cipo_jax.training.step import Batch
from cipo_jax.typing import Params
from cipo_jax.unlearning.engine import Engine
from cipo_jax.unlearning.run_folder import Row


def accepted(counterfactuals: Sequence[Row]) -> list[Row]:
    """The counterfactuals that have a trace."""
    return [row for row in counterfactuals if row["accepted"]]


def draw_rollouts(
    engine: Engine, params: Params, counterfactuals: Sequence[Row], iteration: int
) -> list[Row]:
    """What the current model says to each forget question that has a counterfactual."""
    rules = rules_of_settings(engine.model.format, engine.config.sampling)
    requests = [
        Request(engine.model.format.prompt_ids(row["question"]), row["item"])
        for row in accepted(counterfactuals)
    ]
    drawn = engine.sample_rows(
        f"iteration-{iteration:02d}/rollouts",
        f"iteration {iteration}: rollouts",
        params,
        requests,
        rules,
        engine.key("rollouts", iteration),
        engine.config.cipo.samples,
    )
    rows = []
    for row in (row for samples in drawn for row in samples):
        example = engine.splits.forget[row["item"]]
        leaks = {
            f"{part}_leaks": [
                f for f in example.forbidden if reveals(row[part], f, example.question)
            ]
            for part in ("cot", "answer")
        }
        rows.append({"question": example.question} | row | leaks)
    return rows


def make_pairs(
    counterfactuals: Sequence[Row], rollouts: Sequence[Row], reject: str = "all"
) -> list[Row]:
    """One pair per rollout: the question's counterfactual is chosen, the rollout rejected.

    Args:
      counterfactuals: as `make_counterfactuals` returns them.
      rollouts: as `draw_rollouts` returns them.
      reject: "all" pushes every rollout away; "leaking" only those that leak or do not close their
        think block. The others, which already say something else, stay as pairs of weight 0: the
        model still learns their counterfactual, and the number of pairs, and with it of steps, is
        the same in every iteration.
    """
    by_item = {row["item"]: row for row in accepted(counterfactuals)}
    pairs = []
    for rollout in rollouts:
        chosen = by_item[rollout["item"]]
        leaks = rollout["cot_leaks"] or rollout["answer_leaks"] or not rollout["closed"]
        pairs.append(
            {
                "item": rollout["item"],
                "sample": rollout["sample"],
                "question": rollout["question"],
                "chosen": {"cot": chosen["trace"], "answer": chosen["answer"]},
                "rejected": {"cot": rollout["cot"], "answer": rollout["answer"]},
                "weight": 1.0 if reject == "all" or leaks else 0.0,
                "chosen_ids": chosen["completion_ids"],
                "rejected_ids": rollout["ids"],
            }
        )
    return pairs


def pair_shape(engine: Engine) -> Shape:
    """One padded shape for the pairs of all iterations: longest prompt, longest sample."""
    encode = engine.model.format.prompt_ids
    longest = max((encode(e.question) for e in engine.splits.forget), key=len)
    return shape_of([TokenizedExample(longest, [0] * engine.config.sampling.max_new_tokens)])


def with_reference_logps(
    engine: Engine, params: Params, pairs: Sequence[Row], reference: str
) -> list[Row]:
    """Adds the reference's log-probabilities, computed once, to the pairs."""
    encode = engine.model.format.prompt_ids
    rows = []
    for pair in pairs:
        prompt = encode(pair["question"])
        rows += [
            TokenizedExample(prompt, pair["chosen_ids"]),
            TokenizedExample(prompt, pair["rejected_ids"]),
        ]
    sums = [float(lp.sum()) for lp in engine.scorer.token_logps(params, rows, pair_shape(engine))]
    return [
        pair
        | {
            "reference": reference,
            "ref_chosen_logp": sums[2 * i],
            "ref_rejected_logp": sums[2 * i + 1],
        }
        for i, pair in enumerate(pairs)
    ]


# Every phase asks for the same, of every run beside this one too.
@functools.lru_cache(maxsize=4)
def _encoded(format: ChatFormat, examples: tuple[Example, ...]) -> list[TokenizedExample]:
    return [
        TokenizedExample(
            format.prompt_ids(e.question), format.completion_ids(e.cot or "", e.answer)
        )
        for e in examples
    ]


def retained_batches(
    engine: Engine, settings: TrainConfig, phase: int
) -> Callable[[int], dict[str, Any]]:
    """Batches of what is to be kept: facts and reasoning, whichever there are.

    Args:
      engine: of the run.
      settings: batch sizes.
      phase: number of the phase, which decides the order.
    """
    groups = {
        "retain": ((*engine.splits.retain, *engine.splits.rehearse), settings.retain_batch),
        "reasoning": (engine.splits.reasoning, settings.reasoning_batch),
    }
    streams = {}
    for number, (name, (examples, size)) in enumerate(groups.items()):
        if not examples:
            continue
        rows = _encoded(engine.model.format, examples)
        order = shuffled_batches(len(rows), size, phase_seed(engine, phase, 1 + number))
        streams[name] = (rows, shape_of(rows), order)

    def at(step: int) -> dict[str, Any]:
        return {
            name: collate([rows[i] for i in order(step)], shape)
            for name, (rows, shape, order) in streams.items()
        }

    return at


def _kept(engine: Engine, settings: TrainConfig, phase: int) -> Callable[[int], dict[str, Any]]:
    """`retained_batches`, or nothing where CiPO gives them no weight."""
    if not engine.config.cipo.retain_weight:
        return lambda step: {}
    return retained_batches(engine, settings, phase)


def phase_seed(engine: Engine, phase: int, stream: int) -> int:
    """A seed for one stream of one phase, as a function of the run's seed alone."""
    return int(np.random.SeedSequence((engine.config.seed, phase, stream)).generate_state(1)[0])


def warmup_batches(
    engine: Engine, counterfactuals: Sequence[Row]
) -> tuple[Callable[[int], Batch], int]:
    """Batches of the supervised warm-up by step, and the number of steps."""
    settings = engine.config.warmup
    encode = engine.model.format.prompt_ids
    rows = [
        TokenizedExample(encode(row["question"]), row["completion_ids"])
        for row in accepted(counterfactuals)
    ]
    shape, order = (
        pair_shape(engine),
        shuffled_batches(len(rows), settings.batch, phase_seed(engine, 0, 0)),
    )
    retained = _kept(engine, settings, 0)

    def at(step: int) -> Batch:
        return {"chosen": collate([rows[i] for i in order(step)], shape)} | retained(step)

    return at, steps_of(settings, len(rows))


def pair_batches(
    engine: Engine, pairs: Sequence[Row], iteration: int
) -> tuple[Callable[[int], Batch], int]:
    """Batches of an iteration's preference phase by step, and the number of steps."""
    settings = engine.config.train
    encode = engine.model.format.prompt_ids
    prompts = [encode(pair["question"]) for pair in pairs]
    chosen = [
        TokenizedExample(p, pair["chosen_ids"]) for p, pair in zip(prompts, pairs, strict=True)
    ]
    rejected = [
        TokenizedExample(p, pair["rejected_ids"]) for p, pair in zip(prompts, pairs, strict=True)
    ]
    shape = pair_shape(engine)
    order = shuffled_batches(len(pairs), settings.batch, phase_seed(engine, iteration, 0))
    retained = _kept(engine, settings, iteration)

    def at(step: int) -> Batch:
        picked = order(step)
        sides = [collate([side[i] for i in picked], shape) for side in (chosen, rejected)]
        batch: Batch = {"pairs": jax.tree.map(lambda a, b: np.stack([a, b], axis=1), *sides)}
        batch["weights"] = np.array([pairs[i]["weight"] for i in picked], np.float32)
        if "ref_chosen_logp" in pairs[0]:
            keys = ("ref_chosen_logp", "ref_rejected_logp")
            batch["ref"] = np.array([[pairs[i][k] for k in keys] for i in picked], np.float32)
        return batch | retained(step)

    return at, steps_of(settings, len(pairs))


def steps_of(settings: TrainConfig, rows: int) -> int:
    return max(int(-(-settings.epochs * rows // settings.batch)), 1) if settings.epochs else 0
