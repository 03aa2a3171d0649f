import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from trees import assert_trees_close

from cipo_jax.ops.token_logps import token_logps
from cipo_jax.training.mesh import make_mesh

# Both sides are float32 and differ in the order of summation: a few ulps of numbers near 10.
TOLERANCE = 1e-5


def naive(hidden, head, targets):
    logps = jax.nn.log_softmax(jnp.einsum("BCD,DV->BCV", hidden, head), axis=-1)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]


def problem(batch=3, length=7, width=16, vocabulary=40, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, length, width)).astype(np.float32)
    head = rng.normal(size=(width, vocabulary)).astype(np.float32)
    targets = rng.integers(0, vocabulary, size=(batch, length)).astype(np.int32)
    weights = rng.normal(size=(batch, length)).astype(np.float32)
    return hidden, head, targets, weights


def value_and_grad(function):
    """Of a weighted sum of log-probabilities, w.r.t. hidden states and head, with the values."""

    def loss(hidden, head, targets, weights):
        logps = function(hidden, head, targets)
        return jnp.sum(jnp.where(weights == 0, 0.0, weights * logps)), logps

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


# 21 tokens: chunks that divide them, that do not, and one that is larger than all.
@pytest.mark.parametrize("chunk", [7, 8, 1024])
def test_equals_log_softmax_and_gather(chunk):
    arguments = problem()
    (_, values), grads = value_and_grad(lambda h, w, y: token_logps(h, w, y, chunk))(*arguments)
    (_, wanted), wanted_grads = value_and_grad(naive)(*arguments)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, wanted, rtol=0, atol=TOLERANCE)
    for found, exact in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(found, exact, rtol=TOLERANCE, atol=TOLERANCE)


def test_padding_content_has_no_influence_and_extremes_stay_finite():
    hidden, head, targets, weights = problem()
    real = np.arange(7) < np.array([7, 4, 2])[:, None]
    weights = np.where(real, weights, 0).astype(np.float32)
    other, _, other_targets, _ = problem(seed=1)
    other = np.where(real[..., None], hidden, 1e4 * other).astype(np.float32)
    other_targets = np.where(real, targets, other_targets)
    function = value_and_grad(lambda h, w, y: token_logps(h, w, y, 8))
    (value, logps), grads = function(hidden, head, targets, weights)
    (other_value, other_logps), other_grads = function(other, head, other_targets, weights)
    # Exactly: what padding adds to any sum is zero.
    assert value == other_value
    np.testing.assert_array_equal(logps[real], other_logps[real])
    assert np.isfinite(other_logps).all()
    assert np.min(other_logps) < -1e4
    for found, wanted in zip(other_grads, grads, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_narrow_hidden_states_keep_a_float32_head_gradient():
    hidden, head, targets, _ = problem(batch=8, length=64)
    narrow = jnp.asarray(hidden, jnp.bfloat16)
    weights = np.full((8, 64), 1 / 512, np.float32)

    def run(chunk):
        function = value_and_grad(lambda h, w, y: token_logps(h, w, y, chunk))
        (_, values), (_, head_grad) = function(narrow, head, targets, weights)
        return values, head_grad

    values, many = run(4)
    _, one = run(512)
    assert values.dtype == many.dtype == jnp.float32
    # The head is rounded to bfloat16 (8 bits): logits near 10 move by a few 1e-2.
    np.testing.assert_allclose(values, naive(hidden, head, targets), rtol=0, atol=0.2)
    # Each chunk's share is rounded to bfloat16 once (2**-9 of it); their sum is not.
    np.testing.assert_allclose(many, one, rtol=0, atol=2**-7 * float(np.max(np.abs(one))))


def gradient_temp_bytes(function, batch, length, width, vocabulary):
    def loss(hidden, head, targets):
        return jnp.mean(function(hidden, head, targets))

    compiled = (
        jax.jit(jax.grad(loss, (0, 1)))
        .lower(
            jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
            jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
            jax.ShapeDtypeStruct((batch, length), jnp.int32),
        )
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_logits_of_all_tokens_never_exist():
    shape = (4, 512, 64, 8192)
    all_logits = 4 * 4 * 512 * 8192
    chunked = gradient_temp_bytes(lambda h, w, y: token_logps(h, w, y, 256), *shape)
    assert chunked < all_logits / 4
    assert gradient_temp_bytes(naive, *shape) >= all_logits


def test_sharding_the_vocabulary_changes_nothing():
    hidden, head, targets, weights = problem()
    mesh = make_mesh(2, 1, 4)
    function = value_and_grad(lambda h, w, y: token_logps(h, w, y, 8))
    wanted = function(hidden, head, targets, weights)
    sharded = jax.device_put(head, NamedSharding(mesh, PartitionSpec(None, "tensor")))
    assert sharded.addressable_shards[0].data.shape == (16, 10)
    found = function(hidden, sharded, targets, weights)
    assert found[1][1].sharding.spec == PartitionSpec(None, "tensor")
    assert_trees_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)
