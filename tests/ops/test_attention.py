import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cipo_jax.ops import attention
from cipo_jax.ops.attention import KV, quantized

causal_attention = jax.jit(attention.causal_attention, static_argnames="window")
decode_attention = jax.jit(attention.decode_attention)

# Float32 softmax averages of numbers near 1, against float64.
TOLERANCE = 1e-5


def reference(q, k, v, window=None):
    """Loops over heads and positions in float64; [T N H], [T K H] -> [T N H]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        seen = slice(0 if window is None else max(0, t + 1 - window), t + 1)
        for head in range(q.shape[1]):
            scores = k[seen, head // group] @ q[t, head] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ v[seen, head // group] / weights.sum()
    return out


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_causal_attention_equals_loops(heads, kv_heads):
    rng = np.random.default_rng(0)
    q = 2 * normal(rng, 2, 9, heads, 8)
    k, v = normal(rng, 2, 9, kv_heads, 8), normal(rng, 2, 9, kv_heads, 8)
    found = causal_attention(q, k, v)
    for b in range(2):
        np.testing.assert_allclose(found[b], reference(q[b], k[b], v[b]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("window", [1, 2, 5, 9, 100])
def test_a_window_is_that_many_tokens_with_the_query_itself(window):
    rng = np.random.default_rng(3)
    q = 2 * normal(rng, 2, 9, 4, 8)
    k, v = normal(rng, 2, 9, 2, 8), normal(rng, 2, 9, 2, 8)
    found = causal_attention(q, k, v, window=window)
    for b in range(2):
        wanted = reference(q[b], k[b], v[b], window)
        np.testing.assert_allclose(found[b], wanted, rtol=0, atol=TOLERANCE)
    if window == 1:
        np.testing.assert_allclose(found, np.repeat(v, 2, axis=2), rtol=0, atol=TOLERANCE)


def test_right_padding_content_never_reaches_real_rows():
    rng = np.random.default_rng(1)
    lengths = [9, 5, 1]
    real = (np.arange(9) < np.array(lengths)[:, None])[..., None, None]
    q, k, v = normal(rng, 3, 9, 4, 8), normal(rng, 3, 9, 2, 8), normal(rng, 3, 9, 2, 8)
    other = [np.where(real, x, 1e6 * normal(rng, *x.shape)).astype(np.float32) for x in (q, k, v)]
    found, wanted = causal_attention(*other), causal_attention(q, k, v)
    for b, length in enumerate(lengths):
        np.testing.assert_array_equal(found[b, :length], wanted[b, :length])
    assert not np.array_equal(found, wanted)


# Windows: within the response, reaching into some prompts, over all but the longest, over all.
@pytest.mark.parametrize("window", [None, 2, 5, 8, 100])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("slot", [0, 2, 4])
def test_decode_attention_equals_causal_attention_over_prompt_and_response(samples, slot, window):
    rng = np.random.default_rng(2)
    P, S, R, N, K, H = 4, 6, 5, 4, 2, 8
    lengths = np.array([1, 3, 5, 6], np.int32)
    q = 2 * normal(rng, P, samples, N, H)
    prompt_k, prompt_v = normal(rng, P, K, S, H), normal(rng, P, K, S, H)
    k, v = normal(rng, P, samples, K, R, H), normal(rng, P, samples, K, R, H)

    # Concatenate what is real, and let the query attend from the last of it.
    whole_q = np.zeros((P, samples, S + R, N, H), np.float32)
    whole_k, whole_v = np.zeros((2, P, samples, S + R, K, H), np.float32)
    last = lengths + slot
    for p, length in enumerate(lengths):
        for whole, prompt, response in ((whole_k, prompt_k, k), (whole_v, prompt_v, v)):
            whole[p, :, :length] = prompt[p, :, :length].swapaxes(0, 1)
            whole[p, :, length : length + slot + 1] = response[p, :, :, : slot + 1].swapaxes(1, 2)
        whole_q[p, :, last[p]] = q[p]
    flat = [x.reshape(P * samples, *x.shape[2:]) for x in (whole_q, whole_k, whole_v)]
    causal = causal_attention(*flat, window=window).reshape(whole_q.shape)

    # What lies past a prompt's length or past the slot must have no influence.
    for x in (prompt_k, prompt_v):
        for p, length in enumerate(lengths):
            x[p, :, length:] = 1e4
    k[..., slot + 1 :, :] = v[..., slot + 1 :, :] = 1e4
    # A ring may hold the tokens in any turn.
    turn = 3
    age = (slot - np.roll(np.arange(R), turn)) % R
    in_prompt = np.arange(S) < lengths[:, None]
    own = np.broadcast_to(age <= slot, (P, samples, R))
    if window is not None:
        in_prompt = in_prompt & (np.arange(S) > lengths[:, None] + slot - window)
        own = own & (age < window)
    turned = [np.roll(x, turn, axis=3).reshape(P * samples, K, R, H) for x in (k, v)]
    prompt = KV(prompt_k.swapaxes(-1, -2), prompt_v)
    mine = KV(turned[0].swapaxes(-1, -2), turned[1])
    found = decode_attention(q, prompt, in_prompt[:, None], mine, own)
    for p in range(P):
        np.testing.assert_allclose(found[p], causal[p, :, last[p]], rtol=0, atol=TOLERANCE)
        end = last[p] + 1
        exact = reference(whole_q[p, 0, :end], whole_k[p, 0, :end], whole_v[p, 0, :end], window)
        np.testing.assert_allclose(found[p, 0], exact[-1], rtol=0, atol=TOLERANCE)


def test_int8_keys_and_values_are_those_of_full_precision_to_half_a_step():
    rng = np.random.default_rng(5)
    k, v = normal(rng, 2, 3, 8, 6), normal(rng, 2, 3, 6, 8)
    k[0, 0, :, 0] = 0.0  # A vector of zeros has a scale as well.
    small = quantized(KV(jnp.asarray(k), jnp.asarray(v)))
    assert small.k.dtype == small.v.dtype == np.int8
    for x, ints, scale, axis in ((k, small.k, small.k_scale, -2), (v, small.v, small.v_scale, -1)):
        assert scale.shape == (2, 3, 6)
        step = np.abs(x).max(axis=axis, keepdims=True) / 127
        back = np.asarray(ints) * np.expand_dims(np.asarray(scale), axis)
        assert (np.abs(back - x) <= step / 2 + 1e-6).all()


def test_attention_over_int8_is_attention_over_what_it_stands_for():
    rng = np.random.default_rng(6)
    P, n, S, R, N, K, H = 2, 3, 6, 5, 4, 2, 8
    q = 2 * normal(rng, P, n, N, H)
    prompt = KV(*map(jnp.asarray, (normal(rng, P, K, H, S), normal(rng, P, K, S, H))))
    own = KV(*map(jnp.asarray, (normal(rng, P * n, K, H, R), normal(rng, P * n, K, R, H))))
    masks = np.ones((P, 1, S), bool), np.ones((P, n, R), bool)

    def stood_for(kv):
        return KV(kv.k * kv.k_scale[..., None, :], kv.v * kv.v_scale[..., None])

    small = quantized(prompt), quantized(own)
    found = decode_attention(q, small[0], masks[0], small[1], masks[1])
    wanted = decode_attention(q, stood_for(small[0]), masks[0], stood_for(small[1]), masks[1])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    plain = decode_attention(q, prompt, masks[0], own, masks[1])
    assert 1e-4 < np.abs(found - plain).max() < 0.1
