import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cipo_jax.ops import sampling

draw = jax.jit(sampling.draw, static_argnums=(2, 3))
top_p_mask = jax.jit(sampling.top_p_mask, static_argnums=1)


def sorted_reference(logits, top_p):
    """The nucleus by a sort, in float64; whatever ties with its last token is in."""
    logits = np.asarray(logits, np.float64)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    descending = -np.sort(-probs, axis=-1)
    enough = np.cumsum(descending, axis=-1) >= top_p
    last = np.where(enough.any(-1), enough.argmax(-1), probs.shape[-1] - 1)
    return probs >= np.take_along_axis(descending, last[:, None], axis=-1)


def random_logits(kind, rows, vocabulary):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(rows, vocabulary))
    if kind == "normal":
        logits = 2 * noise
    elif kind == "flat":
        logits = 1e-2 * noise
    elif kind == "peaked":
        logits = noise + 14 * (np.arange(vocabulary) == 5)
    else:
        logits = rng.integers(-3, 4, size=(rows, vocabulary))
    return logits.astype(np.float32)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "ties"])
@pytest.mark.parametrize(("rows", "vocabulary"), [(200, 37), (3, 50000)])
def test_top_p_mask_equals_a_sort(kind, rows, vocabulary, top_p):
    logits = random_logits(kind, rows, vocabulary)
    found = np.asarray(top_p_mask(logits, top_p))
    # The float32 sum of V probabilities is off by some V * 2**-24 at worst, far less as a rule;
    # a row whose nucleus depends on less than that has two right answers.
    slack = 1e-6 if vocabulary < 100 else 1e-4
    least = sorted_reference(logits, top_p - slack)
    most = sorted_reference(logits, top_p + slack)
    assert not (least & ~found).any()
    assert not (found & ~most).any()
    clear = (least == most).all(-1)
    np.testing.assert_array_equal(found[clear], sorted_reference(logits, top_p)[clear])
    if vocabulary < 100:
        assert clear.mean() > 0.95


def test_top_p_mask_keeps_ties_with_the_last_token():
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.1, 0.1]], np.float32))
    found = top_p_mask(logits, 0.5)
    assert found.tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize("top_p", [1e-6, 0.3])
def test_top_p_mask_always_keeps_the_most_likely_token(top_p):
    logits = random_logits("normal", 20, 37)
    found = np.asarray(top_p_mask(logits, top_p))
    assert found[np.arange(20), np.argmax(logits, axis=-1)].all()
    if top_p == 1e-6:
        assert (found.sum(-1) == 1).all()


def test_both_ways_to_the_nucleus_are_one():
    """Rows whose nucleus has few tokens, and rows that have to be bisected, beside each other."""
    few, many = random_logits("peaked", 4, 5000), random_logits("flat", 4, 5000)
    mixed = np.stack([few, many], axis=1).reshape(8, 5000)
    found = np.asarray(top_p_mask(mixed, 0.9))
    assert (found.sum(-1)[0::2] <= 64).all() and (found.sum(-1)[1::2] > 64).all()
    alone = np.concatenate([top_p_mask(row[None], 0.9) for row in mixed])
    np.testing.assert_array_equal(found, alone)
    probs = jax.nn.softmax(mixed, axis=-1)
    bisected = np.asarray(probs >= sampling._threshold(probs, 0.9))
    np.testing.assert_array_equal(found, bisected)


def test_greedy_takes_the_most_likely_token_whatever_the_keys():
    logits = random_logits("normal", 20, 37)
    for seed in range(2):
        keys = jax.random.split(jax.random.key(seed), 20)
        ids, *_ = draw(logits, keys, 0.0, 0.1)
        np.testing.assert_array_equal(ids, np.argmax(logits, axis=-1))
        assert ids.dtype == jnp.int32


def chi_square(ids, probs):
    counts = np.bincount(np.asarray(ids), minlength=len(probs))
    expected = probs * len(ids)
    return float(np.sum((counts - expected) ** 2 / expected))


@pytest.mark.parametrize("vocabulary", [1, 2, 97, 512, 1000, 1024, 49152])
def test_the_most_likely_token_is_the_first_of_the_greatest(vocabulary):
    rng = np.random.default_rng(vocabulary)
    # Few values, so that there are ties in a block and between blocks.
    logits = rng.integers(-3, 4, (9, vocabulary)).astype(np.float32)
    logits[0], logits[1] = -np.inf, 0.0
    logits[2, vocabulary // 2 :] = -np.inf
    np.testing.assert_array_equal(jax.jit(sampling.most_likely)(logits), np.argmax(logits, axis=-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_draws_follow_the_tempered_distribution(temperature):
    row = np.array([1.0, 0.5, 0.0, -0.5, -1.0, 0.2, 0.9, -0.1])
    rows = 20000
    logits = np.broadcast_to(row.astype(np.float32), (rows, 8))
    ids, *_ = draw(logits, jax.random.split(jax.random.key(0), rows), temperature, 1.0)

    def probs(temperature):
        weights = np.exp(row / temperature)
        return weights / weights.sum()

    # With 7 degrees of freedom, one seed in 10,000 exceeds 29.9.
    assert chi_square(ids, probs(temperature)) < 29.9
    assert chi_square(ids, probs(1.3 * temperature)) > 100


def test_the_nucleus_is_taken_after_the_temperature():
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    rows = 4000
    logits = np.broadcast_to(np.log(probs).astype(np.float32), (rows, 4))
    keys = jax.random.split(jax.random.key(1), rows)
    # At temperature 0.5 the first two hold 25/30 of the mass, at temperature 1 only 0.7.
    warm, *_ = draw(logits, keys, 0.5, 0.8)
    assert set(np.asarray(warm).tolist()) == {0, 1}
    # One degree of freedom: one seed in 10,000 exceeds 15.1.
    assert chi_square(warm, np.array([16, 9]) / 25) < 15.1
    plain, *_ = draw(logits, keys, 1.0, 0.8)
    assert set(np.asarray(plain).tolist()) == {0, 1, 2}


def test_a_row_owes_nothing_to_the_others():
    logits = random_logits("normal", 16, 37)
    keys = jax.random.split(jax.random.key(2), 16)
    ids, logps, _ = draw(logits, keys, 0.9, 0.9)
    kept = np.array([0, 3, 11])
    others = random_logits("flat", 16, 37)
    others[kept] = logits[kept]
    other_keys = jax.random.split(jax.random.key(3), 16).at[kept].set(keys[kept])
    again, logps_again, _ = draw(others, other_keys, 0.9, 0.9)
    np.testing.assert_array_equal(again[kept], ids[kept])
    np.testing.assert_array_equal(logps_again[kept], logps[kept])
    assert not np.array_equal(again, ids)
    # Nor to its place among them.
    backwards, *_ = draw(logits[::-1], keys[::-1], 0.9, 0.9)
    np.testing.assert_array_equal(backwards[::-1], ids)
    rekeyed, *_ = draw(logits, jax.random.split(jax.random.key(4), 16), 0.9, 0.9)
    assert not np.array_equal(rekeyed, ids)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.0, 0.7), (0.5, 0.7), (0.5, 1.0), (1.0, 0.7), (1.0, 1.0)]
)
def test_logps_are_those_of_the_model_itself(temperature, top_p):
    logits = random_logits("normal", 16, 37)
    ids, logps, _ = draw(logits, jax.random.split(jax.random.key(5), 16), temperature, top_p)
    exact = logits.astype(np.float64)
    wanted = exact[np.arange(16), ids] - np.log(np.exp(exact).sum(-1))
    # Float32, numbers below 20.
    np.testing.assert_allclose(logps, wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("vocabulary", [3, 256, 257, 1000])
def test_draws_follow_the_distribution_over_blocks_of_the_vocabulary(vocabulary):
    rows = 20000
    row = np.random.default_rng(2).normal(size=vocabulary)
    row[::3] = -np.inf
    logits = np.broadcast_to(row.astype(np.float32), (rows, vocabulary))
    ids, total = jax.jit(sampling.categorical)(logits, jax.random.split(jax.random.key(6), rows))
    probs = np.exp(row) / np.exp(row).sum()
    assert not (np.asarray(ids) % 3 == 0).any()
    freedom = (probs > 0).sum() - 1
    # The mean of chi-square is its freedom, the variance twice that: five deviations.
    kept = probs > 0
    counts = np.bincount(np.asarray(ids), minlength=vocabulary)[kept]
    expected = probs[kept] * rows
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom) + 5
    np.testing.assert_allclose(total, np.log(np.exp(row).sum()), rtol=0, atol=1e-5)


def test_the_inverse_gives_each_index_its_share():
    uniform = np.linspace(0, 1, 4097, dtype=np.float32)[:-1]
    weights = np.broadcast_to(np.ones(256, np.float32), (4096, 256))
    found = jax.jit(sampling._inverse)(weights, uniform)
    np.testing.assert_array_equal(np.bincount(np.asarray(found)), 16)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_inverse_never_finds_a_weight_of_zero(uniform):
    weights = np.random.default_rng(3).random((500, 192)).astype(np.float32)
    weights[:, :20] = weights[:, -20:] = 0
    weights *= 10.0 ** np.random.default_rng(4).integers(-30, 1, weights.shape)
    found = np.asarray(jax.jit(sampling._inverse)(weights, np.full(500, uniform, np.float32)))
    assert (weights[np.arange(500), found] > 0).all()
