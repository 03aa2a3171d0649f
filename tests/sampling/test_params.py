"""Sampling parameters other than temperature and top-p, and limits of requests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, one_device

from cipo_jax.models.decoder import Compute, hidden_states
from cipo_jax.ops.sampling import draw
from cipo_jax.sampling import Request, Sampler, SamplingJob, SamplingParams

KEY = jax.random.key(4)
# Other programs sum in another order: f32 rounding of logits of order 10.
LOGP_ATOL = 5e-5

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def sampler():
    return Sampler(CONFIG, Compute(), one_device(), 4, decode_chunk=5)


@pytest.fixture(scope="module")
def prepared(sampler, params):
    return sampler.prepare(params)


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(1)
    return [Request(rng.integers(0, 64, n).tolist(), 7 * n) for n in (3, 9, 1, 14, 6, 2)]


def flat(rows):
    return [c for row in rows for c in row]


def logits_before(params, prompt, ids):
    """[tokens, V] logits that each of the ids was drawn from, by the training layout."""
    whole = np.zeros((1, 64), np.int32)
    whole[0, : len(prompt) + len(ids)] = [*prompt, *ids]
    logits = _logits(params, whole)[0]
    return np.asarray(logits[len(prompt) - 1 : len(prompt) + len(ids) - 1], np.float64)


@jax.jit
def _logits(params, tokens):
    return hidden_states(CONFIG, Compute(), params, tokens) @ params["embed"].T


def reference(logits, seen, sampling_params):
    """Log-probabilities of the distribution that a token is drawn from, by sorting."""
    penalty = sampling_params.repetition_penalty
    logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits / sampling_params.temperature
    if sampling_params.top_k:
        logits = np.where(logits >= np.sort(logits)[-sampling_params.top_k], logits, -np.inf)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    below = np.cumsum(p[order]) - p[order]
    p[order[below >= sampling_params.top_p]] = 0.0
    p[p < sampling_params.min_p * p.max()] = 0.0
    with np.errstate(divide="ignore"):
        return np.log(p / p.sum())


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 5},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2, "temperature": 1.3},
    ],
    ids=lambda c: "-".join(c),
)
def test_both_log_probabilities_are_those_of_a_plain_computation(
    sampler, prepared, params, requests, changes
):
    sampling_params = SamplingParams(12, (), **({"temperature": 1.0} | changes))
    plain = flat(
        sampler.sample(prepared, SamplingJob(requests, SamplingParams(12, (), 1.0), KEY, 2))
    )
    drawn = flat(sampler.sample(prepared, SamplingJob(requests, sampling_params, KEY, 2)))
    assert [c.ids for c in drawn] != [c.ids for c in plain]
    for request in requests:
        for completion in (c for c in drawn if c.item == request.item):
            logits = logits_before(params, request.prompt, completion.ids)
            for t, token in enumerate(completion.ids):
                seen = np.zeros(64, bool)
                if sampling_params.repetition_penalty != 1.0:
                    seen[[*request.prompt, *completion.ids[:t]]] = True
                wanted = reference(logits[t], seen, sampling_params)[token]
                assert abs(completion.drawn_logps[t] - wanted) < 10 * LOGP_ATOL
                own = logits[t][token] - np.log(np.exp(logits[t]).sum())
                assert abs(completion.logps[t] - own) < LOGP_ATOL


def test_masks_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (40, 50)).astype(np.float32)
    history = rng.integers(0, 50, (40, 12))
    seen = np.zeros((40, 50), bool)
    np.put_along_axis(seen, history, True, axis=1)
    chain = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(1.3),
            transformers.TemperatureLogitsWarper(0.7),
            transformers.TopKLogitsWarper(20),
            transformers.TopPLogitsWarper(0.9),
            transformers.MinPLogitsWarper(0.03),
        ]
    )
    wanted = chain(torch.tensor(history), torch.tensor(logits)).log_softmax(-1).numpy()
    masks = {"top_k": 20, "min_p": 0.03, "repetition_penalty": 1.3, "seen": jnp.asarray(seen)}
    drawn = set()
    for seed in range(300):
        keys = jax.random.split(jax.random.key(seed), 40)
        ids, _, drawn_logps = _draw(jnp.asarray(logits), keys, 0.7, 0.9, **masks)
        np.testing.assert_allclose(
            drawn_logps, wanted[np.arange(40), ids], rtol=0, atol=2e-5
        )  # -inf, a token that transformers forbids, would fail.
        drawn |= set(enumerate(np.asarray(ids).tolist()))
    likely = {(i, j) for i, j in zip(*np.nonzero(wanted > np.log(0.05)), strict=True)}
    assert likely <= drawn


_draw = jax.jit(
    lambda logits, keys, temperature, top_p, **more: draw(logits, keys, temperature, top_p, **more),
    static_argnums=(2, 3),
    static_argnames=("top_k", "min_p", "repetition_penalty"),
)


def test_greedy_and_forced_tokens_were_certain(sampler, prepared, requests):
    for row in sampler.sample(prepared, SamplingJob(requests, SamplingParams(6, ()), KEY)):
        assert row[0].drawn_logps == [0.0] * 6 and all(p < 0 for p in row[0].logps)


CLOSE = (9, 4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_thinking_budget_closes_what_is_still_open(
    sampler, prepared, params, requests, temperature
):
    free = SamplingParams(20, (), temperature)
    sampling_params = dataclasses.replace(free, think_budget=6, close_ids=CLOSE)
    whole = flat(sampler.sample(prepared, SamplingJob(requests, free, KEY, 2)))
    drawn = flat(sampler.sample(prepared, SamplingJob(requests, sampling_params, KEY, 2)))
    for a, b in zip(whole, drawn, strict=True):
        assert len(b.ids) == 20
        natural = any(tuple(b.ids[i : i + 2]) == CLOSE for i in range(5))
        assert natural or tuple(b.ids[6:8]) == CLOSE
        assert a.ids[:6] == b.ids[:6]
        if not natural:
            assert b.drawn_logps[6:8] == [0.0, 0.0]
            request = next(r for r in requests if r.item == b.item)
            logits = logits_before(params, request.prompt, b.ids)
            own = logits[6][9] - np.log(np.exp(logits[6]).sum())
            assert abs(b.logps[6] - own) < LOGP_ATOL
    assert any(a.ids != b.ids for a, b in zip(whole, drawn, strict=True))


def test_a_block_that_is_closed_in_time_is_left_alone(sampler, prepared, requests):
    free = SamplingParams(20, ())
    whole = sampler.sample(prepared, SamplingJob(requests, free, KEY))
    # Take for the tag what the first row says at tokens 2 and 3.
    close = tuple(whole[0][0].ids[2:4])
    sampling_params = dataclasses.replace(free, think_budget=6, close_ids=close)
    assert (
        sampler.sample(prepared, SamplingJob(requests[:1], sampling_params, KEY))[0][0].ids
        == whole[0][0].ids
    )
    # And where the prompt has closed it already, nothing is forced.
    closed = [r._replace(prefill=close) for r in requests]
    assert [
        c[0].ids for c in sampler.sample(prepared, SamplingJob(closed, sampling_params, KEY))
    ] == [c[0].ids for c in sampler.sample(prepared, SamplingJob(closed, free, KEY))]


def test_a_budget_needs_a_tag():
    with pytest.raises(ValueError, match="close_ids"):
        SamplingParams(5, (), think_budget=3)


def test_a_completion_goes_on_from_its_prefill(sampler, prepared, requests):
    sampling_params = SamplingParams(12, ())
    whole = sampler.sample(prepared, SamplingJob(requests, sampling_params, KEY))
    begun = [r._replace(prefill=c.ids[:5]) for r, (c,) in zip(requests, whole, strict=True)]
    for (a,), (b,) in zip(
        whole, sampler.sample(prepared, SamplingJob(begun, sampling_params, KEY)), strict=True
    ):
        assert b.ids[:7] == a.ids[5:]
        np.testing.assert_allclose(b.logps[:7], a.logps[5:], rtol=0, atol=LOGP_ATOL)


def detokenize(ids):
    return "".join(f"<{i}>" if i % 3 else f"{i}" for i in ids)


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_a_stop_text_ends_a_row_with_the_token_that_completes_it(
    prepared, requests, chunk, sampler
):
    sampling_params = SamplingParams(24, (), 1.0)
    whole = flat(sampler.sample(prepared, SamplingJob(requests, sampling_params, KEY, 3)))
    texts = (detokenize(whole[2].ids[4:6]), detokenize(whole[7].ids[10:11]), "never")
    other = dataclasses.replace(sampler, decode_chunk=chunk)
    stopped = dataclasses.replace(sampling_params, stop_texts=texts)
    drawn = flat(
        other.sample(prepared, SamplingJob(requests, stopped, KEY, 3, detokenize=detokenize))
    )
    kinds = set()
    for a, b in zip(whole, drawn, strict=True):
        ends = [
            n
            for n in range(1, 25)
            if any(text in detokenize(a.ids[max(n - 40, 0) : n]) for text in texts)
        ]
        end = ends[0] if ends else 24
        assert b.ids == a.ids[:end] and len(b.logps) == len(b.drawn_logps) == end
        assert b.stop == ("text" if ends else "length")
        kinds.add(b.stop)
    assert kinds == {"text", "length"}


def test_stop_texts_need_a_detokenizer(sampler, prepared, requests):
    with pytest.raises(ValueError, match="detokenize"):
        sampler.sample(
            prepared, SamplingJob(requests, SamplingParams(5, (), stop_texts=("a",)), KEY)
        )


def test_a_request_may_have_a_limit_of_its_own(sampler, prepared, requests):
    sampling_params = SamplingParams(20, (), 1.0)
    whole = sampler.sample(prepared, SamplingJob(requests, sampling_params, KEY))
    limits = [1, 20, 7, 3, 12, 2]
    cut = [r._replace(max_new_tokens=n) for r, n in zip(requests, limits, strict=True)]
    for n, (a,), (b,) in zip(
        limits, whole, sampler.sample(prepared, SamplingJob(cut, sampling_params, KEY)), strict=True
    ):
        assert b.ids == a.ids[:n] and b.stop == "length"


@pytest.mark.parametrize(
    ("bad", "sampling_params", "more", "message"),
    [
        (Request([], 3), SamplingParams(5, ()), {}, "request 1 has an empty prompt"),
        (
            Request([1], 3, max_new_tokens=0),
            SamplingParams(5, ()),
            {},
            "request 1 may draw no token",
        ),
        (Request([1], -3), SamplingParams(5, ()), {}, "request 1: item -3"),
        (Request([1], 3), SamplingParams(0, ()), {}, "may draw no token"),
        (Request([1], 3), None, {}, "no sampling_params"),
        (Request([1], 3), SamplingParams(5, ()), {"num_samples": 0}, "num_samples = 0"),
        (Request([1], 3), SamplingParams(5, ()), {"key": "rbg"}, "kind rbg"),
    ],
)
def test_what_cannot_be_sampled_is_said_at_once(
    sampler, prepared, requests, bad, sampling_params, more, message
):
    if "key" in more:
        more = {"key": jax.random.key(0, impl=more["key"])}
    with pytest.raises(ValueError, match=message):
        sampler.stream(prepared, SamplingJob([requests[0], bad], sampling_params, **more))


def test_no_requests_and_the_samplers_own_params(sampler, prepared, requests):
    assert sampler.sample(prepared, SamplingJob([], SamplingParams(5, ()), KEY)) == []
    own = dataclasses.replace(sampler, sampling_params=SamplingParams(5, (), 1.0))
    assert list(own.stream(prepared, SamplingJob(requests[:2]))) == list(
        sampler.stream(
            prepared, SamplingJob(requests[:2], SamplingParams(5, (), 1.0), jax.random.key(0))
        )
    )


def test_one_sample_is_streamed_at_a_time(sampler, prepared, requests):
    job = SamplingJob(requests[:1], SamplingParams(5, ()), KEY, num_samples=2)
    with pytest.raises(ValueError, match="one request and one sample"):
        sampler.stream_parts(prepared, job)


def test_later_samples_can_be_drawn_by_themselves(sampler, prepared, requests):
    sampling_params = SamplingParams(12, (), 1.0)
    whole = {
        (c.item, c.sample): c
        for c in sampler.stream(prepared, SamplingJob(requests, sampling_params, KEY, 4))
    }
    later = list(
        sampler.stream(prepared, SamplingJob(requests, sampling_params, KEY, 2, first_sample=2))
    )
    assert sorted((c.item, c.sample) for c in later) == sorted(at for at in whole if at[1] >= 2)
    assert all(c.ids == whole[c.item, c.sample].ids for c in later)
    job = SamplingJob(requests, sampling_params, KEY, 2, first_sample=2)
    for request, row in zip(requests, sampler.sample(prepared, job), strict=True):
        assert [c.ids for c in row] == [whole[request.item, n].ids for n in (2, 3)]


def test_samples_that_are_taken_over_are_those_of_their_own_prompt(prepared, sampler):
    rng = np.random.default_rng(8)
    requests = [
        Request(rng.integers(0, 64, 5).tolist(), i, max_new_tokens=n)
        for i, n in enumerate([1, 1, 40])
    ]
    sampling_params = SamplingParams(40, (), 1.0)
    wide = dataclasses.replace(sampler, max_batch_size=12)
    narrow = dataclasses.replace(sampler, max_batch_size=3)
    a, b = (
        s.sample(prepared, SamplingJob(requests, sampling_params, KEY, 4)) for s in (wide, narrow)
    )
    assert [c.ids for c in flat(a)] == [c.ids for c in flat(b)]


def test_int8_keys_and_values_hardly_change_what_is_likely(prepared, sampler, requests):
    small = dataclasses.replace(sampler, int8_cache=True)
    sampling_params = SamplingParams(16, ())
    full = flat(sampler.sample(prepared, SamplingJob(requests, sampling_params, KEY)))
    int8 = flat(small.sample(prepared, SamplingJob(requests, sampling_params, KEY)))
    same = [
        a == b for x, y in zip(full, int8, strict=True) for a, b in zip(x.ids, y.ids, strict=True)
    ]
    assert np.mean(same) > 0.5
    first = [abs(a.logps[0] - b.logps[0]) for a, b in zip(full, int8, strict=True)]
    later = [abs(a.logps[1] - b.logps[1]) for a, b in zip(full, int8, strict=True)
             if a.ids[:2] == b.ids[:2]]  # fmt: skip
    # The first token comes from the prompt alone, in full precision; the second from the cache.
    assert max(first) < LOGP_ATOL < max(later) < 0.3
