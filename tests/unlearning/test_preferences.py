"""Which rollouts are pushed away, and that pairs weigh what they should."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cipo_jax.models.reasoning_model import ReasoningModel
from cipo_jax.unlearning.preferences import make_pairs, retained_batches

from cipo_jax import losses
from cipo_jax.config import Config, TrainConfig
from cipo_jax.data.examples import Example

COUNTERFACTUALS = [
    {"item": 0, "accepted": True, "trace": "t", "answer": "a", "completion_ids": [5, 6]},
    {"item": 1, "accepted": False, "trace": None, "answer": None, "completion_ids": None},
]


def rollout(cot_leaks=(), answer_leaks=(), closed=True):
    return {
        "item": 0, "sample": 0, "question": "q", "cot": "c", "answer": "b", "ids": [7],
        "closed": closed, "cot_leaks": list(cot_leaks), "answer_leaks": list(answer_leaks),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "weight"),
    [
        (rollout(), 0.0),
        (rollout(cot_leaks=["x"]), 1.0),
        (rollout(answer_leaks=["x"]), 1.0),
        (rollout(closed=False), 1.0),
    ],
    ids=["clean", "cot", "answer", "unclosed"],
)
def test_only_what_leaks_or_breaks_down_is_pushed_away(row, weight):
    (pair,) = make_pairs(COUNTERFACTUALS, [row], "leaking")
    assert pair["weight"] == weight
    assert (pair["chosen_ids"], pair["rejected_ids"]) == ([5, 6], [7])
    (pair,) = make_pairs(COUNTERFACTUALS, [row], "all")
    assert pair["weight"] == 1.0


LENGTHS = jnp.array([3, 4, 5])


@pytest.mark.parametrize(
    "loss",
    [
        lambda c, r, w: losses.dpo(c, r, c - 1.0, r + 0.5, weights=w)[0],
        lambda c, r, w: losses.ipo(c, r, c - 1.0, r + 0.5, LENGTHS, LENGTHS, weights=w)[0],
        lambda c, r, w: losses.simpo(c, r, LENGTHS, LENGTHS, weights=w)[0],
    ],
    ids=["dpo", "ipo", "simpo"],
)
def test_weights_are_factors_in_the_mean_over_pairs(loss):
    chosen, rejected = jnp.array([-3.0, -5.0, -2.0]), jnp.array([-4.0, -1.0, -2.5])
    weights = jnp.array([1.0, 0.0, 0.5])
    each = []
    for i in range(3):
        one_hot = jnp.zeros(3).at[i].set(1.0)
        each.append(3.0 * float(loss(chosen, rejected, one_hot)))
    expected = np.dot(weights, each) / 3.0
    assert float(loss(chosen, rejected, weights)) == pytest.approx(expected, rel=1e-6)
    assert float(loss(chosen, rejected, None)) == pytest.approx(np.mean(each), rel=1e-6)
    gradient = jax.grad(loss)(chosen, rejected, weights)
    assert gradient[1] == 0.0
    assert abs(gradient[0]) > 0.0


def test_what_is_rehearsed_is_retained_with_the_facts():
    def rows(word, count):
        return tuple(Example(f"{word} {i}", "9", cot=f"so {i}") for i in range(count))

    splits = SimpleNamespace(retain=rows("fact", 3), rehearse=rows("skill", 2), reasoning=())
    model = ReasoningModel.open("asset:tiny_lrm/target")
    engine = SimpleNamespace(splits=splits, model=model, config=Config())
    at = retained_batches(engine, TrainConfig(retain_batch=5), phase=1)
    wanted = {
        tuple(model.format.prompt_ids(e.question)) for e in (*splits.retain, *splits.rehearse)
    }
    for step in range(3):  # A pass over all five.
        batch = at(step)
        assert set(batch) == {"retain"}
        drawn = batch["retain"].tokens
        assert {next(p for p in wanted if tuple(r[: len(p)]) == p) for r in drawn} == wanted
