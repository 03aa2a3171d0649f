"""Unlearning losses against their formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from trees import assert_trees_close

from cipo_jax import losses

# Everything here runs in float64, so that only the order of a few operations is left to differ.
TOLERANCE = 1e-12
B, C, V, D = 3, 7, 11, 5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


def softmax(z):
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def mask_of(seed=0, length=C):
    lengths = np.random.default_rng(seed).integers(1, length + 1, B)
    lengths[0] = length
    return np.arange(length) < lengths[:, None]


def logps_of(seed, length=C):
    return -np.random.default_rng(seed).uniform(0.05, 4.0, (B, length))


def sums(seed):
    return -np.random.default_rng(seed).uniform(1.0, 30.0, 6)


def logits_of(seed, length=C):
    return np.random.default_rng(seed).normal(0, 2, (B, length, V))


def targets_of(length=C):
    return np.random.default_rng(9).integers(0, V, (B, length))


def mean(values, mask):
    return values[mask].mean()


def p_of(logits, targets):
    return np.take_along_axis(softmax(logits), targets[..., None], -1)[..., 0]


# ---- formulas


def test_ga_is_the_mean_log_probability():
    logps, mask = logps_of(1), mask_of()
    loss, metrics = losses.ga(logps, mask)
    np.testing.assert_allclose(loss, mean(logps, mask), rtol=TOLERANCE)
    np.testing.assert_allclose(metrics["forget/nll"], -mean(logps, mask), rtol=TOLERANCE)


def test_grad_diff_and_tru_are_their_sums():
    f, r, t = (logps_of(i) for i in (1, 2, 3))
    mf, mr, mt = (mask_of(i) for i in (1, 2, 3))
    loss, metrics = losses.grad_diff(f, mf, r, mr, gamma=0.7, alpha=1.3)
    np.testing.assert_allclose(loss, 0.7 * mean(f, mf) - 1.3 * mean(r, mr), rtol=TOLERANCE)
    np.testing.assert_allclose(metrics["retain/nll"], -mean(r, mr), rtol=TOLERANCE)
    loss, metrics = losses.tru(t, mt, f, mf, r, mr, alpha=0.2, retain_weight=0.5)
    target = -np.mean([(t[b][mt[b]]).mean() for b in range(B)])
    wanted = target + 0.2 * (mean(f, mf) - 0.5 * mean(r, mr))
    np.testing.assert_allclose(loss, wanted, rtol=TOLERANCE)
    assert set(metrics) == {"target/nll", "forget/nll", "retain/nll"}


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_npo_equals_its_formula(beta):
    logps, ref = sums(1), sums(2)
    loss, metrics = losses.npo(logps, ref, beta=beta)
    wanted = np.mean(-2 / beta * log_sigmoid(-beta * (logps - ref)))
    np.testing.assert_allclose(loss, wanted, rtol=TOLERANCE)
    np.testing.assert_allclose(metrics["forget/logratio"], np.mean(logps - ref), rtol=TOLERANCE)
    np.testing.assert_allclose(losses.npo(ref, ref, beta=beta)[0], 2 / beta * np.log(2))


def test_npo_tends_to_gradient_ascent():
    logps, ref = jnp.asarray(sums(1)), sums(2)
    gradient = jax.grad(lambda x: losses.npo(x, ref, beta=1e-7)[0])(logps)
    np.testing.assert_allclose(gradient, np.full(6, 1 / 6), rtol=1e-5)


def test_simnpo_equals_its_formula():
    logps, lengths = sums(1), np.array([3, 5, 9, 2, 14, 1])
    loss, _ = losses.simnpo(logps, lengths, beta=4.5, delta=0.3)
    wanted = np.mean(-2 / 4.5 * log_sigmoid(4.5 * (-logps / lengths - 0.3)))
    np.testing.assert_allclose(loss, wanted, rtol=TOLERANCE)


@pytest.mark.parametrize(("beta1", "beta2"), [(5.0, 1.0), (1.0, 0.0), (0.0, 2.0)])
def test_wga_and_satimp_weigh_without_a_gradient_of_the_weights(beta1, beta2):
    logps, mask = logps_of(1), mask_of()
    p = np.exp(logps)
    weights = p**beta1 * (1 - p) ** beta2
    loss, _ = losses.satimp(logps, mask, beta1=beta1, beta2=beta2)
    np.testing.assert_allclose(loss, mean(weights * logps, mask), rtol=TOLERANCE)
    gradient = jax.grad(lambda x: losses.satimp(x, mask, beta1=beta1, beta2=beta2)[0])(
        jnp.asarray(logps)
    )
    np.testing.assert_allclose(gradient, weights * mask / mask.sum(), rtol=1e-10)
    if beta2 == 0.0:
        wga, _ = losses.wga(logps, mask, beta=beta1)
        np.testing.assert_allclose(wga, loss, rtol=TOLERANCE)
    np.testing.assert_allclose(
        losses.wga(logps, mask, beta=0.0)[0], losses.ga(logps, mask)[0], rtol=TOLERANCE
    )


def test_idk_dpo_is_dpo_on_the_scale_of_npo():
    args = [sums(i) for i in range(4)]
    loss, metrics = losses.idk_dpo(*args, beta=0.3)
    dpo, dpo_metrics = losses.dpo(*args, beta=0.3)
    np.testing.assert_allclose(loss, 2 / 0.3 * dpo, rtol=TOLERANCE)
    assert metrics.keys() == dpo_metrics.keys()


def test_hinge_robust_cpo_and_orpo_equal_their_formulas():
    w, l, rw, rl = (sums(i) for i in range(4))  # noqa: E741
    nw, nl = np.array([3, 5, 9, 2, 14, 4]), np.array([7, 2, 6, 12, 3, 8])
    d = 0.4 * ((w - rw) - (l - rl))
    hinge = losses.hinge(w, l, rw, rl, beta=0.4)[0]
    np.testing.assert_allclose(hinge, np.maximum(0, 1 - d).mean(), rtol=TOLERANCE)
    robust = losses.robust_dpo(w, l, rw, rl, beta=0.4, label_smoothing=0.2)[0]
    wanted = ((-0.8 * log_sigmoid(d) + 0.2 * log_sigmoid(-d)) / 0.6).mean()
    np.testing.assert_allclose(robust, wanted, rtol=TOLERANCE)
    cpo = losses.cpo(w, l, nw, beta=0.4, alpha=0.7)[0]
    np.testing.assert_allclose(cpo, (-log_sigmoid(0.4 * (w - l)) - 0.7 * w / nw).mean())

    def log_odds(m):
        return m - np.log1p(-np.exp(m))

    orpo = losses.orpo(w, l, nw, nl, beta=0.4)[0]
    wanted = -w / nw - 0.4 * log_sigmoid(log_odds(w / nw) - log_odds(l / nl))
    np.testing.assert_allclose(orpo, wanted.mean(), rtol=1e-11)


def test_robust_dpo_is_unbiased_under_flipped_labels():
    w, l, rw, rl = (sums(i) for i in range(4))  # noqa: E741
    e = 0.3
    right = losses.robust_dpo(w, l, rw, rl, label_smoothing=e)[0]
    flipped = losses.robust_dpo(l, w, rl, rw, label_smoothing=e)[0]
    true = losses.dpo(w, l, rw, rl)[0]
    np.testing.assert_allclose((1 - e) * right + e * flipped, true, rtol=1e-11)


def test_certain_completions_do_not_break_orpo():
    zero = jnp.zeros(2)
    loss, gradient = jax.value_and_grad(
        lambda x: losses.orpo(x, -jnp.ones(2), jnp.ones(2), jnp.ones(2))[0]
    )(zero)
    assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_distribution_losses_equal_their_formulas():
    z, ref, y, mask = logits_of(1), logits_of(2), targets_of(), mask_of()
    p, q, logp = softmax(z), softmax(ref), np.log(softmax(z))
    kl = (q * (np.log(q) - logp)).sum(-1)
    np.testing.assert_allclose(losses.kl(z, ref, mask)[0], mean(kl, mask), rtol=1e-11)
    warm_q, warm_p = softmax(ref / 2), softmax(z / 2)
    kd = 4 * (warm_q * (np.log(warm_q) - np.log(warm_p))).sum(-1)
    np.testing.assert_allclose(
        losses.kd(z, ref, mask, temperature=2.0)[0], mean(kd, mask), rtol=1e-11
    )
    onehot = np.eye(V)[y]
    without = p * (1 - onehot) / (1 - p_of(z, y))[..., None]
    ceu = -(without * logp).sum(-1)
    np.testing.assert_allclose(losses.ceu(z, y, mask)[0], mean(ceu, mask), rtol=1e-11)
    undial = -(softmax(ref - 10 * onehot) * logp).sum(-1)
    np.testing.assert_allclose(losses.undial(z, ref, y, mask)[0], mean(undial, mask), rtol=1e-11)
    flat = (z.max(-1) - z.mean(-1)) ** 2
    np.testing.assert_allclose(losses.flatness(z, mask)[0], mean(flat, mask), rtol=1e-11)


def test_targets_of_distillation_get_no_gradient():
    z, ref, y, mask = jnp.asarray(logits_of(1)), jnp.asarray(logits_of(2)), targets_of(), mask_of()
    for loss in (
        lambda r: losses.kl(z, r, mask)[0],
        lambda r: losses.kd(z, r, mask)[0],
        lambda r: losses.undial(z, r, y, mask)[0],
    ):
        assert not np.asarray(jax.grad(loss)(ref)).any()
    # CE-U's target is made of the policy's own logits, and is held fixed.
    gradient = jax.grad(lambda z: losses.ceu(z, y, mask)[0])(z)
    p, onehot = softmax(np.asarray(z)), np.eye(V)[y]
    without = p * (1 - onehot) / (1 - p_of(np.asarray(z), y))[..., None]
    np.testing.assert_allclose(gradient, (p - without) * mask[..., None] / mask.sum(), atol=1e-14)


def test_the_dual_variable_rises_while_too_much_is_lost():
    assert losses.dual_ascent(jnp.array(0.5), jnp.array(0.8), epsilon=0.3, lr=2.0) == 1.5
    assert losses.dual_ascent(jnp.array(0.5), jnp.array(0.1), epsilon=0.3, lr=5.0) == 0.0


def test_activation_losses_equal_their_formulas():
    rng = np.random.default_rng(4)
    h, h0 = rng.normal(size=(2, B, C, D))
    mask, u = mask_of(), losses.control_vector(jax.random.key(0), D)
    assert u.shape == (D,) and (np.asarray(u) >= 0).all()
    np.testing.assert_allclose(np.linalg.norm(u), 1.0, rtol=1e-6)
    wanted = ((h - 6.5 * np.asarray(u)) ** 2)[mask].mean()
    np.testing.assert_allclose(losses.rmu_forget(h, mask, u)[0], wanted, rtol=1e-11)
    kept = ((h - h0) ** 2)[mask].mean()
    np.testing.assert_allclose(losses.hidden_match(h, h0, mask)[0], kept, rtol=1e-11)
    loss, terms = losses.r2mu(
        (h, mask), (h, h0, mask), (h0, mask), (h0, h, mask), u,
        retain_weight=1.4, trace_weight=0.5, reasoning_weight=2.0,
    )  # fmt: skip
    traces = ((h0 - 6.5 * np.asarray(u)) ** 2)[mask].mean()
    np.testing.assert_allclose(loss, wanted + 3.4 * kept + 0.5 * traces, rtol=1e-11)
    assert len(terms) == 4


# ---- what holds for all of them


def cases(length=C):
    """name -> (loss of its differentiable arrays, those arrays), for completions of a length."""
    mask, y = mask_of(0, length), targets_of(length)
    other = logits_of(2, length)
    rng = np.random.default_rng(4)
    h, h0 = rng.normal(size=(2, B, length, D))
    u = np.ones(D) / np.sqrt(D)
    return {
        "ga": (lambda x: losses.ga(x, mask)[0], logps_of(1, length), mask),
        "grad_diff": (
            lambda x: losses.grad_diff(x, mask, 2 * x, mask)[0], logps_of(1, length), mask,
        ),
        "tru": (
            lambda x: losses.tru(x, mask, 2 * x, mask, 3 * x, mask)[0], logps_of(1, length), mask,
        ),
        "kl": (lambda x: losses.kl(x, other, mask)[0], logits_of(1, length), mask),
        "kd": (lambda x: losses.kd(x, other, mask, temperature=2.0)[0], logits_of(1, length), mask),
        "undial": (lambda x: losses.undial(x, other, y, mask)[0], logits_of(1, length), mask),
        "flatness": (lambda x: losses.flatness(x, mask)[0], logits_of(1, length), mask),
        "rmu": (lambda x: losses.rmu_forget(x, mask, u)[0], h, mask),
        "hidden_match": (lambda x: losses.hidden_match(x, h0, mask)[0], h, mask),
    }  # fmt: skip


STOPPED = {  # Their gradients are not those of their values, since part of them is held fixed.
    "wga": lambda x, mask, y: losses.wga(x, mask)[0],
    "satimp": lambda x, mask, y: losses.satimp(x, mask)[0],
}


@pytest.mark.parametrize("name", list(cases()))
def test_gradients_are_those_of_finite_differences(name):
    loss, x, _ = cases()[name]
    check_grads(loss, (jnp.asarray(x),), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_gradients_of_sums_are_those_of_finite_differences():
    args = tuple(jnp.asarray(sums(i)) for i in range(2))
    ref = [sums(i) for i in (2, 3)]
    n = np.array([3, 5, 9, 2, 14, 4])
    for loss in (
        lambda a, b: losses.npo(a, b * 0 + ref[0])[0] + 0 * b.sum(),
        lambda a, b: losses.simnpo(a, n)[0] + 0 * b.sum(),
        lambda a, b: losses.robust_dpo(a, b, *ref)[0],
        lambda a, b: losses.cpo(a, b, n)[0],
        lambda a, b: losses.orpo(a, b, n, n)[0],
        lambda a, b: losses.idk_dpo(a, b, *ref)[0],
    ):
        check_grads(loss, args, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [*cases(), *STOPPED])
@pytest.mark.parametrize("content", [1e9, np.nan, -np.inf])
def test_padding_has_no_influence_on_loss_or_gradient(name, content):
    if name in STOPPED:
        mask, x = mask_of(), logps_of(1)
        loss = lambda x: STOPPED[name](x, mask, None)  # noqa: E731
    else:
        loss, x, mask = cases()[name]
    wide = mask.reshape(mask.shape + (1,) * (x.ndim - 2))
    noisy = np.where(wide, x, content)
    found, gradient = jax.value_and_grad(loss)(jnp.asarray(noisy))
    wanted, wanted_gradient = jax.value_and_grad(loss)(jnp.asarray(x))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-12, atol=1e-15)
    assert not np.asarray(gradient)[~mask].any()


# ---- without [B, C, V]

PER_TOKEN = {
    "kl": (losses.kl_per_token, 2, False),
    "kd": (lambda z, r: losses.kd_per_token(z, r, 2.0), 2, False),
    "ceu": (losses.ceu_per_token, 1, True),
    "undial": (losses.undial_per_token, 2, True),
    "flatness": (losses.flatness_per_token, 1, False),
}


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("name", list(PER_TOKEN))
def test_in_chunks_values_and_gradients_are_those_of_whole_logits(name, chunk):
    function, models, targets = PER_TOKEN[name]
    rng = np.random.default_rng(7)
    states = [jnp.asarray(rng.normal(size=(B, C, D))) for _ in range(models)]
    heads = [jnp.asarray(rng.normal(size=(D, V))) for _ in range(models)]
    others = (jnp.asarray(targets_of()),) if targets else ()
    mask = mask_of()

    def whole(state, head):
        pairs = [(state, head), *zip(states[1:], heads[1:], strict=True)]
        values = function(*(h @ w for h, w in pairs), *others)
        return jnp.sum(jnp.where(mask, values, 0.0))

    def cut(state, head):
        pairs = [(state, head), *zip(states[1:], heads[1:], strict=True)]
        values = losses.over_chunks(function, pairs, *others, chunk=chunk)
        return jnp.sum(jnp.where(mask, values, 0.0))

    found = jax.value_and_grad(cut, argnums=(0, 1))(states[0], heads[0])
    wanted = jax.value_and_grad(whole, argnums=(0, 1))(states[0], heads[0])
    assert_trees_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", list(PER_TOKEN))
def test_no_array_of_all_logits_exists_in_either_pass(name):
    function, models, targets = PER_TOKEN[name]
    rows, length, chunk, size = 8, 96, 32, 4096
    states = [jax.ShapeDtypeStruct((rows, length, 16), jnp.float32)] * models
    heads = [jax.ShapeDtypeStruct((16, size), jnp.float32)] * models
    others = [jax.ShapeDtypeStruct((rows, length), jnp.int32)] if targets else []

    def loss(states, heads, others):
        pairs = list(zip(states, heads, strict=True))
        return jnp.mean(losses.over_chunks(function, pairs, *others, chunk=chunk))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(states, heads, others).compile()
    whole = rows * length * size * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * whole


@pytest.mark.parametrize("name", list(PER_TOKEN))
def test_a_vocabulary_that_is_split_gives_the_same(name):
    from jax.sharding import NamedSharding, PartitionSpec

    from cipo_jax.training.mesh import make_mesh

    function, models, targets = PER_TOKEN[name]
    rng = np.random.default_rng(7)
    states = [rng.normal(size=(B, C, D)) for _ in range(models)]
    heads = [rng.normal(size=(D, 16)) for _ in range(models)]
    others = (targets_of(),) if targets else ()

    def loss(states, heads):
        pairs = list(zip(states, heads, strict=True))
        return jnp.mean(losses.over_chunks(function, pairs, *others, chunk=8))

    split = NamedSharding(make_mesh(1, 2, 4), PartitionSpec(None, "tensor"))
    step = jax.jit(jax.value_and_grad(loss))
    wanted = step(*jax.tree.map(jnp.asarray, (states, heads)))
    found = step(jax.tree.map(jnp.asarray, states), [jax.device_put(h, split) for h in heads])
    assert_trees_close(found, wanted, rtol=1e-10, atol=1e-13)
