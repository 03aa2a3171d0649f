import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_batch import STOPPED_AT_LENGTH, STOPPED_BY_ID, generate
from small_model import CONFIG, random_params

from cipo_jax.models.decoder import (
    Compute,
    DecoderConfig,
    decoding_layout,
    hidden_states,
)
from cipo_jax.sampling import SamplingParams

TIED = CONFIG
UNTIED = DecoderConfig(
    vocab_size=64, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, head_dim=8,
    tied_head=False, qkv_bias=True, qk_norm="head",
)  # fmt: skip
R, S, N = 10, 8, 2
LENGTHS = np.array([1, 5, 8], np.int32)
GREEDY = SamplingParams(R, ())
WARM = SamplingParams(R, (), temperature=0.9, top_p=0.9)

# Logits are of order 10, and decoding sums the same f32 products in another order than training:
# some 1e-6 a layer.
LOGP_ATOL = 5e-5


pytestmark = pytest.mark.usefixtures("quick_compilation")


_params = functools.cache(random_params)


@functools.cache
def _decoding(config):
    return decoding_layout(config, _params(config), "float32")


_generate = jax.jit(generate, static_argnums=(0, 1, 2))


def _keys(prompts=3, samples=N, seed=0):
    return jax.random.split(jax.random.key(seed), (prompts, samples))


@functools.cache
def _prompts(seed=0):
    prompts = np.random.default_rng((1, seed)).integers(0, 64, (3, S)).astype(np.int32)
    return np.where(np.arange(S) < LENGTHS[:, None], prompts, 0)


def _run(sampling_params, prompts=None, lengths=LENGTHS, keys=None, config=TIED):
    prompts = _prompts() if prompts is None else prompts
    keys = _keys() if keys is None else keys
    out = _generate(config, Compute(), sampling_params, _decoding(config), prompts, lengths, keys)
    return jax.tree.map(np.asarray, out)


@functools.partial(jax.jit, static_argnums=0)
def _teacher(config, params, tokens):
    head = params["embed"].T if config.tied_head else params["head"]
    return jax.nn.log_softmax(hidden_states(config, Compute(), params, tokens) @ head)


def _forced(out, config=TIED):
    """[P, n, R, V] log-probabilities of the training layout before each of the tokens in `out`."""
    tokens = np.zeros((3 * N, S + R), np.int32)
    for row, (i, j) in enumerate(np.ndindex(3, N)):
        tokens[row, : LENGTHS[i]] = _prompts()[i, : LENGTHS[i]]
        tokens[row, LENGTHS[i] : LENGTHS[i] + R] = out.ids[i, j]
    logps = np.asarray(_teacher(config, _params(config), tokens)).reshape(3, N, S + R, -1)
    return np.stack([logps[i, :, n - 1 : n - 1 + R] for i, n in enumerate(LENGTHS)])


def _assert_equal(got, expected):
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_array_equal(got.lengths, expected.lengths)
    np.testing.assert_array_equal(got.stops, expected.stops)
    np.testing.assert_allclose(got.logps, expected.logps, rtol=0, atol=LOGP_ATOL)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied-bias-norm"])
def test_sampled_logps_are_those_of_teacher_forcing(config):
    out = _run(WARM, config=config)
    forced = _forced(out, config)
    expected = np.take_along_axis(forced, out.ids[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logps, expected, rtol=0, atol=LOGP_ATOL)
    assert (out.lengths == R).all() and (out.stops == STOPPED_AT_LENGTH).all()
    assert out.logps.std() > 0.1


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied-bias-norm"])
def test_greedy_tokens_are_the_argmax_of_teacher_forcing(config):
    out = _run(GREEDY, config=config)
    forced = _forced(out, config)
    np.testing.assert_array_equal(out.ids, forced.argmax(axis=-1))
    np.testing.assert_allclose(out.logps, forced.max(axis=-1), rtol=0, atol=LOGP_ATOL)
    # Greedy decoding owes nothing to its keys.
    np.testing.assert_array_equal(out.ids[:, 0], out.ids[:, 1])


def _cut(whole, stop_ids):
    """What `whole`, drawn without stop ids, becomes with them: each row cut after the first."""
    ids, logps = whole.ids.copy(), whole.logps.copy()
    lengths, stops = whole.lengths.copy(), whole.stops.copy()
    for i, j in np.ndindex(lengths.shape):
        hits = np.flatnonzero(np.isin(ids[i, j], stop_ids))
        if hits.size:
            lengths[i, j], stops[i, j] = hits[0] + 1, STOPPED_BY_ID
            ids[i, j, hits[0] + 1 :], logps[i, j, hits[0] + 1 :] = 0, 0.0
    return whole._replace(ids=ids, logps=logps, lengths=lengths, stops=stops)


def test_rows_end_with_their_first_stop_id_and_are_zero_past_it():
    whole = _run(WARM)
    # One row ends at once, another in its middle, and the last of them not at all.
    kept = set(whole.ids[2, 1].tolist())
    early = next(t for t in whole.ids[0, 0].tolist() if t not in kept)
    late = next(t for t in whole.ids[1, 0, 4:].tolist() if t not in kept)
    stop_ids = (int(early), int(late))
    out = _run(SamplingParams(R, stop_ids, WARM.temperature, WARM.top_p))
    _assert_equal(out, _cut(whole, stop_ids))
    assert {STOPPED_AT_LENGTH, STOPPED_BY_ID} == set(out.stops.flat)
    for i, j in np.ndindex(out.lengths.shape):
        n = out.lengths[i, j]
        assert not out.ids[i, j, n:].any() and not out.logps[i, j, n:].any()
        if out.stops[i, j] == STOPPED_BY_ID:
            assert out.ids[i, j, n - 1] in stop_ids
        assert not np.isin(out.ids[i, j, : n - 1], stop_ids).any()


def test_zero_can_be_a_stop_id_though_padding_is_zero_too():
    # The ids are renamed so that the sampler meets token 0 early: it is the likeliest by far.
    config = UNTIED
    decoding = _decoding(config)
    first = _run(GREEDY, config=config).ids[1, 0, 3]
    order = np.arange(64)
    order[[0, first]] = order[[first, 0]]
    renamed = decoding | {"embed": decoding["embed"][order], "head": decoding["head"][:, order]}
    rename = np.argsort(order)
    prompts = np.where(np.arange(S) < LENGTHS[:, None], rename[_prompts()], 63).astype(np.int32)
    args = (prompts, LENGTHS, _keys())
    whole = jax.tree.map(np.asarray, _generate(config, Compute(), GREEDY, renamed, *args))
    out = _generate(config, Compute(), SamplingParams(R, (0,)), renamed, *args)
    assert 0 in whole.ids
    _assert_equal(jax.tree.map(np.asarray, out), _cut(whole, [0]))


def test_batches_whose_rows_all_stop_at_once_or_soon():
    whole = _run(WARM)
    everything = tuple(range(64))
    out = _run(SamplingParams(R, everything, WARM.temperature, WARM.top_p))
    _assert_equal(out, _cut(whole, everything))
    assert (out.lengths == 1).all() and (out.stops == STOPPED_BY_ID).all()
    most = tuple(t for t in everything if t not in whole.ids[:, :, 0])
    out = _run(SamplingParams(R, most, WARM.temperature, WARM.top_p))
    _assert_equal(out, _cut(whole, most))
    assert out.lengths.min() == 2


@pytest.mark.parametrize("stops", [(), tuple(range(64))], ids=["length", "stop"])
def test_one_new_token(stops):
    out = _run(SamplingParams(1, stops, WARM.temperature, WARM.top_p))
    whole = _run(WARM)
    assert out.ids.shape == (3, N, 1)
    np.testing.assert_array_equal(out.ids, whole.ids[:, :, :1])
    np.testing.assert_allclose(out.logps, whole.logps[:, :, :1], rtol=0, atol=LOGP_ATOL)
    assert (out.lengths == 1).all()
    assert (out.stops == (STOPPED_BY_ID if stops else STOPPED_AT_LENGTH)).all()


@pytest.mark.parametrize("sampling_params", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_row_depends_on_its_prompt_and_its_key_alone(sampling_params):
    whole = _run(sampling_params)

    def same(got, i, j, a, b):
        np.testing.assert_array_equal(got.ids[i, j], whole.ids[a, b])
        np.testing.assert_allclose(got.logps[i, j], whole.logps[a, b], rtol=0, atol=LOGP_ATOL)

    # Its place: prompts and samples in another order.
    order, flip = np.array([2, 0, 1]), np.array([1, 0])
    moved = _run(sampling_params, _prompts()[order], LENGTHS[order], _keys()[order][:, flip])
    for i, j in np.ndindex(3, N):
        same(moved, i, j, order[i], flip[j])

    # Its neighbors: other prompts of other lengths, other keys.
    mixed, lengths = _prompts(1).copy(), np.array([3, 5, 2], np.int32)
    mixed[1] = _prompts()[1]
    keys = _keys(seed=9).at[1, 1].set(_keys()[1, 1])
    same(_run(sampling_params, mixed, lengths, keys), 1, 1, 1, 1)

    # What stands past the prompt's length.
    noisy = np.where(np.arange(S) < LENGTHS[:, None], _prompts(), 61).astype(np.int32)
    got = _run(sampling_params, noisy)
    for i, j in np.ndindex(3, N):
        same(got, i, j, i, j)

    # How many others there are, and how far the prompt is padded.
    alone = np.zeros((1, 13), np.int32)
    alone[0, :S] = _prompts()[1]
    same(_run(sampling_params, alone, LENGTHS[1:2], _keys()[1:2, 1:2]), 0, 0, 1, 1)
    crowd = jnp.concatenate([_keys(seed=5), _keys()], axis=1)
    same(_run(sampling_params, keys=crowd), 1, 3, 1, 1)


def test_samples_and_seeds_differ_and_repeat():
    out = _run(WARM)
    rows = {tuple(row) for row in out.ids.reshape(-1, R).tolist()}
    assert len(rows) == 3 * N
    np.testing.assert_array_equal(_run(WARM).ids, out.ids)
    assert (_run(WARM, keys=_keys(seed=1)).ids != out.ids).any()


def _nucleus(logps, temperature, top_p):
    """Tempered, truncated and renormalized probabilities of one position, by sorting."""
    p = np.exp(logps.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    below = np.cumsum(p[order]) - p[order]
    kept = np.zeros_like(p, bool)
    kept[order[below < top_p]] = True
    return np.where(kept, p, 0.0) / p[kept].sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (1.5, 0.6)])
def test_first_tokens_follow_the_tempered_nucleus(temperature, top_p):
    draws = 4096
    sampling_params = SamplingParams(1, (), temperature, top_p)
    prompts, lengths = _prompts()[1:2], LENGTHS[1:2]
    out = _run(sampling_params, prompts, lengths, _keys(1, draws))
    logps = np.asarray(_teacher(TIED, _params(TIED), prompts))[0, lengths[0] - 1]
    expected = _nucleus(logps, temperature, top_p)
    counts = np.bincount(out.ids.reshape(-1), minlength=64)
    assert not counts[expected == 0.0].any()
    # Each frequency has a standard deviation of sqrt(p (1 - p) / draws); five of them, and one
    # draw for the rarest tokens, is what a right sampler exceeds once in 10^6 tries.
    slack = 5 * np.sqrt(expected * (1 - expected) / draws) + 2 / draws
    assert (np.abs(counts / draws - expected) < slack).all()
    # The sampler is told apart from one that ignores either setting.
    if (temperature, top_p) != (1.0, 1.0):
        plain = np.exp(logps)
        assert (np.abs(counts / draws - plain) > 5 * slack).any()


def test_later_tokens_stay_inside_the_nucleus():
    sampling_params = SamplingParams(R, (), temperature=1.5, top_p=0.5)
    out = _run(sampling_params)
    forced, outside = _forced(out), 0
    for at in np.ndindex(3, N, R):
        # 1e-4 more, since a token on the very edge may fall to either side in f32.
        assert _nucleus(forced[at], 1.5, 0.5 + 1e-4)[out.ids[at]] > 0.0
        outside += _nucleus(forced[at], 1.5, 0.5)[out.ids[at]] == 0.0
    assert outside <= 1
    expected = np.take_along_axis(forced, out.ids[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logps, expected, rtol=0, atol=LOGP_ATOL)
