"""Which rollouts are pushed away, and that pairs weigh what they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_run import open_fake_run

from cipo_jax import losses
from cipo_jax.config import Config
from cipo_jax.data.batches import TokenizedExample
from cipo_jax.data.examples import Example
from cipo_jax.data.splits import Splits
from cipo_jax.methods.batches import retained_batches
from cipo_jax.methods.cipo import training
from cipo_jax.methods.cipo.config import CipoConfig
from cipo_jax.methods.cipo.pairs import Rollout, Rollouts, make_pairs, pair_up
from cipo_jax.methods.counterfactual_records import (
    AcceptedTrace,
    Counterfactual,
    Counterfactuals,
)
from cipo_jax.runs.data import RetainedExamples, RunData
from cipo_jax.runs.evaluation import RolloutStats
from cipo_jax.shared_config import DataConfig, TrainConfig


def counterfactual(item, accepted):
    return Counterfactual(item, "q", "t", "a", "model", "backward", (1, 2), accepted, ())


TRACES = Counterfactuals(
    2, (counterfactual(0, AcceptedTrace("t", "a", 1.0, -1.0, (5, 6))), counterfactual(1, None))
)


def rollout(cot_leaks=(), answer_leaks=(), closed=True, sample=0):
    return Rollout(0, sample, "q", "c", "b", closed, True, cot_leaks, answer_leaks, (7,))


def rollouts(*rows):
    return Rollouts(RolloutStats(0.0, 0.0, 1.0, len(rows)), rows)


@pytest.mark.parametrize(
    ("row", "weight"),
    [
        (rollout(), 0.0),
        (rollout(cot_leaks=("x",)), 1.0),
        (rollout(answer_leaks=("x",)), 1.0),
        (rollout(closed=False), 1.0),
    ],
    ids=["clean", "cot", "answer", "unclosed"],
)
def test_only_what_leaks_or_breaks_down_is_pushed_away(row, weight):
    (pair,) = pair_up(TRACES, rollouts(row), "leaking")
    assert pair.weight == weight
    assert (pair.chosen.ids, pair.rejected.ids) == ((5, 6), (7,))
    assert (pair.reference, pair.chosen.ref_logp, pair.rejected.ref_logp) == (None, None, None)
    (pair,) = pair_up(TRACES, rollouts(row), "all")
    assert pair.weight == 1.0


def pairs_run(folder, chat, examples, **cipo):
    config = Config(cipo=CipoConfig(**cipo), train=TrainConfig(batch_size=2))
    logp = lambda prompt, completion: [-1.0 * len(prompt) - 0.5] * len(completion)  # noqa: E731
    run = open_fake_run(folder, chat, examples, config, logp=logp)
    run.workspace.data.longest_forget_prompt = 3
    return run


def test_pairs_hold_the_log_probabilities_of_their_reference(tmp_path, chat, examples):
    run = pairs_run(tmp_path, chat, examples)
    pairs = make_pairs(run, TRACES, rollouts(rollout(), rollout(sample=1)), run.base).pairs
    assert [pair.reference for pair in pairs] == ["base", "base"]
    for pair in pairs:  # Sums over two tokens and over one, after a prompt of two.
        assert pair.chosen.ref_logp == pytest.approx(-5.0)
        assert pair.rejected.ref_logp == pytest.approx(-2.5)
    (rows, shape), = run.workspace.scorer.calls  # fmt: skip
    assert [tuple(row.completion) for row in rows] == [(5, 6), (7,)] * 2
    assert shape.completion >= run.config.sampling.max_new_tokens
    without = make_pairs(run, TRACES, rollouts(rollout()), None).pairs
    assert without[0].reference is None and len(run.workspace.scorer.calls) == 1


def test_batches_of_pairs_hold_weights_and_references(tmp_path, chat, examples):
    run = pairs_run(tmp_path, chat, examples, reject="leaking", retain_weight=0.0)
    drawn = rollouts(rollout(), rollout(cot_leaks=("x",), sample=1))
    retained = RetainedExamples((TokenizedExample([1], [2]),), ())
    made = make_pairs(run, TRACES, drawn, run.base)
    batch = training._pair_batches(run, made, retained, 1).at(0)
    # What is retained has no weight, and is left out.
    assert set(batch) == {"pairs", "weights", "ref"}
    assert sorted(batch["weights"]) == [0.0, 1.0]
    np.testing.assert_allclose(batch["ref"], [[-5.0, -2.5]] * 2)
    assert batch["pairs"].lengths.tolist() == [[2, 1]] * 2
    simpo = make_pairs(run, TRACES, drawn, None)
    assert "ref" not in training._pair_batches(run, simpo, retained, 1).at(0)
    kept = dataclasses.replace(run, config=Config(train=run.config.train))
    assert "retain" in training._pair_batches(kept, simpo, retained, 1).at(0)


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


def test_what_is_rehearsed_is_retained_with_the_facts(chat):
    def rows(word, count):
        return tuple(Example(f"{word} {i}", "9", cot=f"so {i}") for i in range(count))

    empty = {f.name: () for f in dataclasses.fields(Splits)}
    splits = Splits(**empty | {"retain": rows("fact", 3), "rehearse": rows("skill", 2)})
    retained = RunData.encode(splits, chat, DataConfig()).retained
    at = retained_batches(retained, TrainConfig(retain_batch_size=5), seed=0, phase=1)
    wanted = {tuple(chat.prompt_ids(e.question)) for e in (*splits.retain, *splits.rehearse)}
    for step in range(3):  # A pass over all five.
        batch = at(step)
        assert set(batch) == {"retain"}
        drawn = batch["retain"].tokens
        assert {next(p for p in wanted if tuple(r[: len(p)]) == p) for r in drawn} == wanted
