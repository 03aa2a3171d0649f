import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilations import compilations
from objectives import FunctionObjective, TrainSettings, objective
from trees import assert_trees_close, assert_trees_equal

from cipo_jax import losses
from cipo_jax.data.batches import PadShape, TokenizedExample, collate, collate_pairs
from cipo_jax.models.decoder import (
    Compute,
    DecoderConfig,
    abstract_params,
    head_matrix,
    hidden_states,
)
from cipo_jax.training.mesh import make_mesh
from cipo_jax.training.objective import StepContext
from cipo_jax.training.optimizer import AdamW, Schedule
from cipo_jax.training.policy import Policy
from cipo_jax.training.step import TrainStep

CONFIG = DecoderConfig(
    vocab_size=64, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, head_dim=8, tied_head=True
)
COMPUTE = Compute(remat="names", logits_chunk=32)
SHAPE = PadShape(16, 12)
PAIRS = 8


def _params(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(0.0, 0.2, x.shape).astype(np.float32), abstract_params(config)
    )


def _rows(rng, count, vocab=64):
    """Prompts of 1 to 4 tokens with completions of 1 to 12."""
    return [
        TokenizedExample(
            rng.integers(0, vocab, rng.integers(1, 5)), rng.integers(0, vocab, rng.integers(1, 13))
        )
        for _ in range(count)
    ]


def _batch(step, kind="preference", pairs=PAIRS, kept=("retain", "reasoning")):
    rng = np.random.default_rng((5, step))
    if kind == "warmup":
        batch = {"chosen": collate(_rows(rng, pairs), SHAPE)}
        kept = [name for name in kept if name == "retain"]
    else:
        batch = {
            "pairs": collate_pairs(_rows(rng, pairs), _rows(rng, pairs), SHAPE),
            "ref": rng.normal(-30.0, 5.0, (pairs, 2)).astype(np.float32),
        }
    return batch | {name: collate(_rows(rng, 4), SHAPE) for name in kept}


def _one():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def _mesh(name):
    return _one() if name == "one" else make_mesh(2, 2, 2)


# Adam divides each gradient by its own size, so with its usual eps of 1e-8 a gradient that is zero
# but for rounding moves its parameter by a whole learning rate, in a direction that is noise. With
# eps = 1e-2 a difference d between two gradients moves a parameter by at most some lr * d / eps.
_SMOOTH = optax.adamw(1e-2, b2=0.99, eps=1e-2, weight_decay=0.1)

# Gradients here are of order 1 and sum a few hundred f32 numbers; another order of summation
# changes them by some 1e-6 (the all-reduces of the mesh, or micro-batches). Three steps of _SMOOTH
# turn that into some 3 * 1e-6, and a wrong sum into far more: a step is up to 1e-2.
_PARAMS_ATOL = 2e-5
_LOSS_RTOL = 1e-5


def _copy(tree):
    return jax.tree.map(np.array, tree)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=["preference", "warmup"])
def runs(request):
    """Three steps of one objective, on one device and on a 2 x 2 x 2 mesh."""
    found = {}
    for name in ("one", "mesh"):
        step = TrainStep(
            Policy(CONFIG, COMPUTE), objective(request.param), _SMOOTH, _mesh(name), ema_decay=0.9
        )
        state, states, metrics, donated = step.init(_params()), [], [], []
        states.append(_copy(state))
        with compilations("_update") as compiled:
            for i in range(3):
                old = jax.tree.leaves(state)
                state, m = step(state, step.put(_batch(i, request.param)))
                donated.append([x.is_deleted() for x in old])
                states.append(_copy(state))
                metrics.append({k: float(v) for k, v in m.items()})
        found[name] = {
            "step": step,
            "compiled": compiled.number,
            "state": state,
            "states": states,
            "metrics": metrics,
            "donated": donated,
        }
    return found


def test_a_mesh_of_eight_computes_what_one_device_does(runs):
    one, mesh = runs["one"], runs["mesh"]
    for a, b in zip(mesh["metrics"], one["metrics"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            # Log-probabilities and rewards are sums that may cancel, hence the absolute part.
            assert a[name] == pytest.approx(b[name], rel=_LOSS_RTOL, abs=1e-4), name
        assert a["loss"] == pytest.approx(b["loss"], rel=_LOSS_RTOL)
    for name in ("params", "ema"):
        assert_trees_close(
            getattr(mesh["states"][-1], name), getattr(one["states"][-1], name), atol=_PARAMS_ATOL
        )


def test_three_steps_move_every_parameter_by_more_than_the_tolerance(runs):
    first, last = runs["one"]["states"][0].params, runs["one"]["states"][-1].params
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, last)
    assert min(jax.tree.leaves(moved)) > 20 * _PARAMS_ATOL
    values = [m["loss"] for m in runs["one"]["metrics"]]
    assert len(set(values)) == 3


@pytest.mark.parametrize("name", ["one", "mesh"])
def test_the_update_compiles_once(runs, name):
    assert runs[name]["compiled"] == 1


@pytest.mark.parametrize("name", ["one", "mesh"])
def test_the_state_is_donated(runs, name):
    assert all(all(step) for step in runs[name]["donated"])


@pytest.mark.parametrize("name", ["one", "mesh"])
def test_the_state_keeps_the_shapes_and_shardings_it_was_promised(runs, name):
    state, abstract = runs[name]["state"], runs[name]["step"].abstract_state()
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for (path, x), a in zip(
        jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(abstract), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert (x.shape, x.dtype) == (a.shape, a.dtype), where
        # Equal and not only equivalent: another spelling would be another program for the next.
        assert x.sharding == a.sharding, where


def test_moments_are_cut_like_their_parameters(runs):
    def specs(tree):
        return jax.tree.map(lambda x: x.sharding.spec, tree)

    abstract = runs["mesh"]["step"].abstract_state()
    for moment in ("mu", "nu"):
        moments = optax.tree.get(abstract.opt_state, moment)
        assert specs(moments) == specs(abstract.params)
    assert abstract.params["embed"].sharding.shard_shape((64, 32)) == (32, 16)


def test_the_moving_average_follows_the_parameters(runs):
    states = runs["one"]["states"]
    for before, after in itertools.pairwise(states):
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema, after.params)
        # One f32 rounding of numbers below 1.
        assert_trees_close(after.ema, expected, atol=1e-6)
    moved = np.abs(states[-1].ema["embed"] - states[0].ema["embed"]).max()
    assert moved > 1e-4


def test_steps_are_counted(runs):
    assert [int(s.step) for s in runs["mesh"]["states"]] == [0, 1, 2, 3]


def test_init_copies_and_starts_the_average_where_it_is_told():
    step = TrainStep(Policy(CONFIG, COMPUTE), objective("warmup"), _SMOOTH, _one(), ema_decay=0.5)
    params, ema = jax.device_put(_params()), jax.device_put(_params(seed=1))
    state = step.init(params, ema=ema)
    assert_trees_equal(state.params, params)
    assert_trees_equal(state.ema, ema)
    same = step.init(params)
    assert_trees_equal(same.ema, params)
    jax.tree.map(lambda x: x.delete(), (state, same))
    # What was passed in outlives the states made of it.
    assert_trees_equal(params, _params())
    assert_trees_equal(ema, _params(seed=1))


def test_the_real_optimizer_has_a_placed_and_donated_state_on_a_mesh():
    settings = TrainSettings(weight_decay=0.1, max_grad_norm=1.0)
    step = TrainStep(
        Policy(dataclasses.replace(CONFIG, qkv_bias=True, tied_head=False), COMPUTE),
        FunctionObjective(
            lambda policy, params, batch: (
                sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params)) * jnp.mean(batch["x"]),
                {},
            )
        ),
        AdamW.from_config(settings),
        make_mesh(2, 2, 2),
    )
    abstract = step.abstract_state()
    state = step.init(_params(step.policy.config), schedule=Schedule.from_config(settings, 5))
    with compilations("_update") as compiled:
        for _ in range(2):
            old = state
            state, _ = step(state, step.put({"x": np.ones(8, np.float32)}))
            assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert jax.tree.all(
        jax.tree.map(lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim), state, abstract)
    )
    assert compiled.number == 1
    assert state.ema is None


# With plain gradient descent at a rate of 1 the change of the parameters is the gradient itself.
_DESCENT = optax.sgd(1.0)


def _stepper(objective, accumulation=1, mesh=None):
    """Makes the function from a batch to gradient and metrics, which compiles once."""
    one = TrainStep(
        Policy(CONFIG, COMPUTE),
        objective,
        _DESCENT,
        mesh or _one(),
        gradient_accumulation_steps=accumulation,
    )

    def step(batch):
        state, metrics = one(one.init(_params()), one.put(batch))
        gradient = jax.tree.map(lambda a, b: a - np.asarray(b), _params(), state.params)
        return gradient, {k: float(v) for k, v in metrics.items()}

    return step


@pytest.fixture(scope="module")
def step():
    return _stepper(objective("preference"))


@pytest.fixture(scope="module")
def whole_step(step):
    return step(_batch(0, kept=("retain",)))


@pytest.mark.parametrize(("accumulation", "mesh"), [(2, "mesh"), (4, "one")])
def test_accumulation_changes_nothing(whole_step, accumulation, mesh):
    step = _stepper(objective("preference"), accumulation, _mesh(mesh))
    gradient, metrics = step(_batch(0, kept=("retain",)))
    expected, expected_metrics = whole_step
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    assert largest > 0.1
    # p - g rounds at the size of p, and a sum in another order at that of g: some 1e-7 and 1e-6.
    assert_trees_close(gradient, expected, atol=5e-6 * max(largest, 1.0))
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(expected_metrics[name], rel=1e-5, abs=1e-4), name


def _ceu(policy, params, group):
    models = [(policy.completion_states(params, group), policy.head(params))]
    values = losses.over_chunks(losses.ceu_per_token, models, group.completions, chunk=32)
    # Its gradients are small beside those of the others.
    return 30.0 * losses.token_mean(values, group.mask, group.num_tokens)


def _small_states(policy, params, group):
    states = policy.layer_states(params, group, 1)
    zeros = jnp.zeros_like(states)
    return losses.hidden_match(states, zeros, group.mask, num_tokens=group.num_tokens)[0]


def _of_logps(loss):
    return lambda policy, params, group: loss(
        policy.completion_logps(params, group), group.mask, group
    )


MEANS = {
    "sequences": _of_logps(lambda x, m, g: losses.nll(x, m, num_sequences=g.num_sequences)[0]),
    "tokens": _of_logps(lambda x, m, g: losses.nll(x, m, "token", num_tokens=g.num_tokens)[0]),
    "ga": _of_logps(lambda x, m, g: 0.5 * losses.ga(x, m, num_tokens=g.num_tokens)[0]),
    "ceu": _ceu,
    "hidden_match": _small_states,
}


def test_accumulation_changes_no_mean_over_tokens_or_over_rows_that_have_some():
    def means(policy, params, batch):
        values = {name: mean(policy, params, batch["rows"]) for name, mean in MEANS.items()}
        return sum(values.values()), values

    rows = [
        TokenizedExample([i, 7], list(range(i, i + length)))
        for i, length in enumerate((12, 1, 9, 0, 5, 0, 11, 2))
    ]
    batch = {"rows": collate(rows, SHAPE)}
    (whole, metrics), (parts, parts_metrics) = (
        _stepper(FunctionObjective(means), n)(batch) for n in (1, 2)
    )
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(whole))
    assert largest > 0.1
    # As in `test_accumulation_changes_nothing`.
    assert_trees_close(parts, whole, atol=5e-6 * max(largest, 1.0))
    for key in (*MEANS, "loss", "grad_norm"):
        assert parts_metrics[key] == pytest.approx(metrics[key], rel=1e-5), key


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_take_every_row_once_and_leave_groups_aligned(accumulation):
    def apart(policy, params, batch):
        number = batch["pairs"].tokens[..., 0].astype(jnp.float32)
        difference = jnp.abs(number - batch["ref"])
        return 0.0 * jnp.sum(params["final_norm"]["scale"]), {
            "apart": jnp.mean(difference) + jnp.mean(jnp.abs(number[:, 0] - number[:, 1])),
            "first": jnp.mean(batch["ref"]),
            "second": jnp.mean(jnp.square(batch["ref"])),
        }

    rows = [TokenizedExample([i], [1]) for i in range(PAIRS)]
    numbers = np.arange(PAIRS, dtype=np.float32)
    batch = {"pairs": collate_pairs(rows, rows, SHAPE), "ref": np.stack([numbers, numbers], axis=1)}
    for mesh in (_one(), make_mesh(2, 2, 2)):
        _, metrics = _stepper(FunctionObjective(apart), accumulation, mesh)(batch)
        assert metrics["apart"] == 0.0
        assert metrics["first"] == pytest.approx(numbers.mean())
        assert metrics["second"] == pytest.approx(np.square(numbers).mean())


def _value(objective, batch):
    """Loss and metrics alone, which compile in a fraction of the time."""
    evaluate = jax.jit(lambda p, b: objective(Policy(CONFIG, COMPUTE), p, b, StepContext()))
    loss, metrics = evaluate(_params(), batch)
    return {"loss": float(loss)} | {k: float(v) for k, v in metrics.items()}


@functools.cache
def _score(config):
    return jax.jit(Policy(config, COMPUTE).completion_logps)


def _logps(params, sequences, config=CONFIG):
    return np.asarray(_score(config)(params, sequences))


@pytest.mark.parametrize("kept", [(), ("reasoning",), ("retain", "reasoning")])
def test_the_loss_is_the_weighted_sum_of_its_parts(kept):
    weights = {"nll_weight": 0.3, "retain_weight": 0.7, "beta": 0.2}
    batch = _batch(0, kept=kept)
    metrics = _value(objective("preference", **weights), batch)
    retained = [metrics[f"nll/{name}"] for name in kept]
    expected = metrics["preference"] + 0.3 * metrics["nll/chosen"]
    expected += 0.7 * sum(retained) / max(len(retained), 1)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert {name for name in metrics if name.startswith("nll/")} == {
        "nll/chosen", *(f"nll/{name}" for name in kept)
    }  # fmt: skip

    def nll(sequences):
        logps = _logps(_params(), sequences)
        return -np.mean([row[:n].mean() for row, n in zip(logps, sequences.lengths, strict=True)])

    chosen = jax.tree.map(lambda x: x[:, 0], batch["pairs"])
    assert metrics["nll/chosen"] == pytest.approx(nll(chosen), rel=1e-5)
    for name in kept:
        assert metrics[f"nll/{name}"] == pytest.approx(nll(batch[name]), rel=1e-5)
    sums = [
        (_logps(_params(), side) * side.mask).sum(axis=1)
        for side in (chosen, jax.tree.map(lambda x: x[:, 1], batch["pairs"]))
    ]
    margin = 0.2 * ((sums[0] - batch["ref"][:, 0]) - (sums[1] - batch["ref"][:, 1]))
    # Sums of some 100 nats in f32.
    assert metrics["preference"] == pytest.approx(np.logaddexp(0, -margin).mean(), rel=1e-4)


def test_warmup_without_a_retain_group_is_plain_nll():
    metrics = _value(objective("warmup"), _batch(0, "warmup", kept=()))
    assert metrics["loss"] == pytest.approx(metrics["nll/chosen"])
    assert set(metrics) == {"loss", "nll/chosen"}


def test_a_policy_equal_to_its_reference_has_a_loss_of_ln_2(step):
    batch = _batch(0, kept=("retain",))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch["pairs"])
    sums = np.where(flat.mask, _logps(_params(), flat), 0.0).sum(axis=1)
    batch["ref"] = sums.reshape(-1, 2).astype(np.float32)
    _, metrics = step(batch)
    # beta times the f32 rounding of two sums of some 100 nats.
    assert metrics["preference"] == pytest.approx(math.log(2.0), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    # It is a start, not a standstill.
    assert metrics["grad_norm"] > 0.1


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_identical_pairs_have_no_preference_gradient(loss):
    plain = objective("preference", loss=loss, nll_weight=0.0, retain_weight=0.0)
    step = TrainStep(Policy(CONFIG, COMPUTE), plain, _DESCENT, _one())

    def norm(batch):
        if loss == "simpo":
            batch.pop("ref")
        _, metrics = step(step.init(_params()), step.put(batch))
        return float(metrics["grad_norm"])

    batch = _batch(0, kept=())
    different = norm(dict(batch))
    chosen = jax.tree.map(lambda x: x[:, 0], batch["pairs"])
    batch["pairs"] = jax.tree.map(lambda x: np.stack([x, x], axis=1), chosen)
    batch["ref"] = np.repeat(batch["ref"][:, :1], 2, axis=1)
    # The two sides' gradients cancel but for the f32 rounding of their sums.
    assert norm(batch) < 1e-5 * different


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="tied"),
        pytest.param(
            {"tied_head": False, "qkv_bias": True, "qk_norm": "head"}, id="untied-bias-norm"
        ),
    ],
)
def test_completion_logps_equal_log_softmax_at_each_position(changes):
    config = dataclasses.replace(CONFIG, **changes)
    params, rows = _params(config), _rows(np.random.default_rng(7), 9)
    got = _logps(params, collate(rows, SHAPE), config=config)

    @jax.jit
    def whole(tokens):
        hidden = hidden_states(config, Compute(), params, tokens)
        # Device arrays, because the shape checks of the tests accept no others.
        return jax.nn.log_softmax(hidden @ head_matrix(config, jax.tree.map(jnp.asarray, params)))

    logps = np.asarray(whole(collate(rows, SHAPE).tokens))
    assert len({len(row.prompt) for row in rows}) > 2
    for i, row in enumerate(rows):
        at = len(row.prompt) - 1 + np.arange(len(row.completion))
        # f32 rounding of logits of order 10.
        np.testing.assert_allclose(
            got[i, : len(row.completion)], logps[i, at, row.completion], rtol=1e-5, atol=2e-5
        )


def _real(logps, sequences):
    return logps[sequences.mask]


def test_what_padding_holds_has_no_influence_at_all():
    rows = _rows(np.random.default_rng(8), 9)
    plain, noisy = collate(rows, SHAPE), collate(rows, SHAPE, pad_id=63)
    # Bit for bit: the same program, and a masked weight is exactly zero.
    np.testing.assert_array_equal(
        _real(_logps(_params(), plain), plain), _real(_logps(_params(), noisy), noisy)
    )


def test_how_much_padding_there_is_has_no_influence():
    rows = _rows(np.random.default_rng(8), 9)
    tight, wide = collate(rows, SHAPE), collate(rows, PadShape(40, 30))
    # Other sizes are other programs, which sum in another order.
    np.testing.assert_allclose(
        _real(_logps(_params(), tight), tight),
        _real(_logps(_params(), wide), wide),
        rtol=1e-5,
        atol=2e-5,
    )


def test_padding_has_no_influence_on_the_gradient(step, whole_step):
    batch, rng = _batch(0, kept=("retain",)), np.random.default_rng(9)

    def scribble(group):
        used = group.prompt_lengths + group.lengths
        past = np.arange(group.tokens.shape[-1]) >= used[..., None]
        noise = rng.integers(0, 64, group.tokens.shape)
        mask = np.arange(group.completions.shape[-1]) < group.lengths[..., None]
        return group._replace(
            tokens=np.where(past, noise, group.tokens).astype(np.int32),
            completions=np.where(mask, group.completions, 63).astype(np.int32),
        )

    noisy = {k: v if k == "ref" else scribble(v) for k, v in batch.items()}
    gradient, metrics = step(noisy)
    # The embeddings of padding enter with a gradient of exactly zero; only the order in which a
    # scatter adds may differ.
    assert_trees_close(gradient, whole_step[0], atol=5e-6)
    assert metrics["loss"] == pytest.approx(whole_step[1]["loss"], rel=1e-6)


def test_logits_of_all_tokens_never_exist_in_an_update(real_compilation):
    vocab, total, pairs = 16384, 64, 8
    config = dataclasses.replace(CONFIG, vocab_size=vocab)
    rng = np.random.default_rng(0)

    def rows(count):
        return [TokenizedExample([1], rng.integers(0, vocab, total - 1)) for _ in range(count)]

    shape = PadShape(total, total - 1)
    batch = {
        "pairs": collate_pairs(rows(pairs), rows(pairs), shape),
        "ref": np.zeros((pairs, 2), np.float32),
    }

    def temporary(chunk):
        step = TrainStep(
            Policy(config, Compute(remat="names", logits_chunk=chunk)),
            objective("preference"),
            AdamW(lr_schedule="linear"),
            _one(),
        )
        return step.lower(batch).compile().memory_analysis().temp_size_in_bytes

    everything = 2 * pairs * total * vocab * 4
    # Most of what is left is gradients of the embeddings, [V, D] each.
    assert temporary(16) < everything / 2
    # The measure tells the two apart: one chunk for all tokens is what must not happen.
    assert temporary(2 * pairs * total) > everything
