import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_batch import generate
from small_model import CONFIG, one_device

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params, decoding_layout
from cipo_jax.sampling import Request, Sampler, SamplingJob, SamplingParams
from cipo_jax.sampling.decode import decode
from cipo_jax.sampling.state import empty_state
from cipo_jax.training.mesh import make_mesh, param_shardings

SAMPLED = SamplingParams(8, (3, 5, 8, 13), temperature=1.0, top_p=0.95)
GREEDY = SamplingParams(8, (3, 5, 8, 13))
KEY = jax.random.key(4)
# Batches of other sizes are other programs, which sum in another order: f32 rounding of logits of
# order 10.
LOGP_ATOL = 5e-5


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(1)
    return [
        Request(rng.integers(0, 64, length).tolist(), 100 + 7 * i)
        for i, length in enumerate([3, 9, 1, 14, 6, 2, 11])
    ]


def _sampler(rows, mesh=None):
    return Sampler(CONFIG, Compute(), mesh or one_device(), rows)


@pytest.fixture(scope="module")
def fours(params):
    sampler = _sampler(4)
    return sampler, sampler.prepare(params)


def _all(sampler, params, requests, sampling_params=SAMPLED, samples=1):
    return sampler.sample(params, SamplingJob(requests, sampling_params, KEY, samples))


@pytest.fixture(scope="module")
def drawn(fours, requests):
    """Two samples of each request, on four rows."""
    return _all(*fours, requests, samples=2)


def _assert_same(got, expected):
    assert [[s.ids for s in r] for r in got] == [[s.ids for s in r] for r in expected]
    assert [[s.stopped for s in r] for r in got] == [[s.stopped for s in r] for r in expected]
    for g, e in zip(got, expected, strict=True):
        for a, b in zip(g, e, strict=True):
            np.testing.assert_allclose(a.logps, b.logps, rtol=0, atol=LOGP_ATOL)


def test_each_request_gets_its_own_samples_in_order(params, requests, drawn):
    assert [len(r) for r in drawn] == [2] * len(requests)
    keys = jnp.stack(
        [
            jnp.stack([jax.random.fold_in(jax.random.fold_in(KEY, r.item), s) for s in (0, 1)])
            for r in requests
        ]
    )
    prompts = np.zeros((len(requests), 20), np.int32)
    for row, request in zip(prompts, requests, strict=True):
        row[: len(request.prompt)] = request.prompt
    lengths = np.array([len(r.prompt) for r in requests], np.int32)
    out = jax.jit(generate, static_argnums=(0, 1, 2))(
        CONFIG,
        Compute(),
        SAMPLED,
        decoding_layout(CONFIG, params, "float32"),
        prompts,
        lengths,
        keys,
    )
    for i, samples in enumerate(drawn):
        for j, sample in enumerate(samples):
            length = int(out.lengths[i, j])
            assert sample.ids == out.ids[i, j, :length].tolist()
            np.testing.assert_allclose(
                sample.logps, out.logps[i, j, :length], rtol=0, atol=LOGP_ATOL
            )
            assert sample.stopped == (sample.ids[-1] in SAMPLED.stop_ids)
            assert sample.stopped or len(sample.ids) == SAMPLED.max_new_tokens
    # Both ends occur, and samples of one request differ: the test above is not about constants.
    assert {s.stopped for r in drawn for s in r} == {True, False}
    assert any(a.ids != b.ids for a, b in drawn)


@pytest.mark.parametrize("rows", [1, 16])
def test_results_do_not_depend_on_rows(params, requests, drawn, rows):
    sampler = _sampler(rows)
    _assert_same(_all(sampler, sampler.prepare(params), requests, samples=2), drawn)


def test_results_follow_their_item_ids_through_any_order(fours, requests, drawn):
    order = np.random.default_rng(3).permutation(len(requests))
    got = _all(*fours, [requests[i] for i in order], samples=2)
    _assert_same(got, [drawn[i] for i in order])


def test_a_request_by_itself_gives_what_it_gives_among_others(fours, requests, drawn):
    # Its prompt of 14 tokens is padded alike, alone and among the others.
    _assert_same(_all(*fours, requests[3:4], samples=2), drawn[3:4])


def test_fewer_samples_are_the_first_of_more(fours, requests, drawn):
    _assert_same(_all(*fours, requests), [r[:1] for r in drawn])


def test_the_item_id_addresses_the_randomness(fours, requests, drawn):
    other = [r._replace(item=r.item + 1) for r in requests]
    got = _all(*fours, other, samples=2)
    assert [s.ids for r in got for s in r] != [s.ids for r in drawn for s in r]


def test_calls_of_one_shape_share_one_program(params, requests):
    # A size that no other test of this file uses. Equal samplers share their programs, so it is
    # the growth that counts.
    sampler = _sampler(3)
    before = sampler._programs.decode._cache_size()
    for seed, part in ((0, requests), (1, requests[:3]), (2, requests[2:6])):
        prepared = sampler.prepare(jax.tree.map(lambda x, s=seed: x + 0.01 * s, params))
        for key in (jax.random.key(seed), jax.random.fold_in(KEY, seed)):
            list(sampler.stream(prepared, SamplingJob(part, GREEDY, key)))
        assert sampler._programs.decode._cache_size() == before + 1
    assert sampler.programs() == ["3 x 1 rows, 16 prompt slots, 16 response slots, greedy"]


def test_equal_samplers_share_what_is_compiled(params, requests):
    compiled = []

    def count(event, seconds, **_):
        compiled.append(event == "/jax/core/compile/backend_compile_duration")

    made = []
    for _ in range(2):
        sampler = Sampler(CONFIG, Compute(), make_mesh(2, 1, 2, jax.devices()[:4]), 5, 9)
        job = SamplingJob(requests, SAMPLED, jax.random.key(4), num_samples=2)
        made.append(sampler.sample(sampler.prepare(params), job))
        if len(made) == 1:
            jax.monitoring.register_event_duration_secs_listener(count)
    jax.monitoring.unregister_event_duration_listener(count)
    assert made[0] == made[1]
    assert not any(compiled)


def test_an_eight_device_mesh_says_what_one_device_says(fours, params, requests):
    mesh = make_mesh(2, 2, 2)
    sampler = _sampler(4, mesh)
    # The weights come as training leaves them: sharded over the same mesh.
    placed = jax.device_put(params, param_shardings(params, mesh))
    _assert_same(
        _all(sampler, sampler.prepare(placed), requests, GREEDY), _all(*fours, requests, GREEDY)
    )
    assert sampler.programs() == ["4 x 1 rows, 16 prompt slots, 16 response slots, greedy"]


def test_the_cache_is_updated_in_place(real_compilation):
    config = DecoderConfig(
        vocab_size=64, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, head_dim=32,
        tied_head=True,
    )  # fmt: skip
    G, w, R = 4, 4, 512
    layout = jax.eval_shape(
        lambda p: decoding_layout(config, p, "float32"), abstract_params(config)
    )
    for int8, width in ((False, 4), (True, 1 + 4 / config.head_dim)):
        prompts, state = jax.eval_shape(
            lambda int8=int8: empty_state(
                config, Compute(), GREEDY.on_device(), int8, (G, w, 16, R)
            )
        )
        compiled = (
            jax.jit(decode, static_argnums=(0, 1, 2, 3), donate_argnums=6)
            .lower(
                config, Compute(), GREEDY.on_device(), 32, layout, prompts, state,
                jax.ShapeDtypeStruct((), jnp.int32),
            )
            .compile()
        )  # fmt: skip
        cache = config.layers * 2 * G * w * config.kv_heads * R * config.head_dim * width
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= cache
        if not int8:  # A copy of one layer's keys would be a quarter.
            assert memory.temp_size_in_bytes < 0.15 * cache


@pytest.mark.parametrize("chunk", [1, 3, 20])
@pytest.mark.parametrize("sampling_params", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_a_completion_that_is_watched_is_the_one_that_is_not(
    params, requests, chunk, sampling_params
):
    sampler = dataclasses.replace(_sampler(1), decode_chunk=chunk)
    prepared = sampler.prepare(params)
    ends = set()
    for request, (wanted,) in zip(
        requests, _all(sampler, prepared, requests, sampling_params), strict=True
    ):
        seen = list(sampler.stream_parts(prepared, SamplingJob([request], sampling_params, KEY)))
        assert seen[-1].ids == wanted.ids and seen[-1].stopped == wanted.stopped
        np.testing.assert_allclose(seen[-1].logps, wanted.logps, rtol=0, atol=LOGP_ATOL)
        for before, after in itertools.pairwise(seen):
            assert after.ids[: len(before.ids)] == before.ids
            assert 0 < len(after.ids) - len(before.ids) <= chunk
        ends.add(wanted.stopped)
    assert ends == {True, False}


def test_ids_that_only_pad_the_embedding_are_never_drawn(params, requests):
    sampler = _sampler(4)
    prepared = sampler.prepare(params)
    drawn = _all(sampler, prepared, requests, SamplingParams(8, (), 1.0), samples=2)
    assert any(i >= 30 for r in drawn for s in r for i in s.ids)
    for temperature in (0.0, 1.0):
        sampling_params = SamplingParams(8, (), temperature, vocabulary=30)
        for row in _all(sampler, prepared, requests, sampling_params, samples=2):
            assert all(i < 30 for s in row for i in s.ids)


def test_params_have_the_stop_ids_and_the_vocabulary_of_a_chat_format():
    from cipo_jax.hub import load_tokenizer, resolve
    from cipo_jax.text.chat_format import ChatFormat

    tokenizer = load_tokenizer(resolve("asset:tiny_lrm/target"))
    sampling_params = SamplingParams.for_chat(ChatFormat(tokenizer, stop_ids=(7, 9)), 5, 0.5, 0.9)
    close_ids = tuple(tokenizer.encode("</think>", add_special_tokens=False))
    stop_ids = (tokenizer.eos_token_id, 7, 9)
    assert sampling_params == SamplingParams(
        5, stop_ids, 0.5, 0.9, len(tokenizer), close_ids=close_ids
    )


def test_sampling_params_of_the_config():
    from cipo_jax.config import SamplingConfig
    from cipo_jax.hub import load_tokenizer, resolve
    from cipo_jax.text.chat_format import ChatFormat

    chat_format = ChatFormat(load_tokenizer(resolve("asset:tiny_lrm/target")))
    settings = SamplingConfig(
        max_new_tokens=5, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1,
        think_budget=3,
    )  # fmt: skip
    assert SamplingParams.from_config(settings, chat_format, ["a"]) == SamplingParams.for_chat(
        chat_format, 5, 0.5, 0.9, top_k=7, min_p=0.1, repetition_penalty=1.1, think_budget=3,
        stop_texts=("a",),
    )  # fmt: skip
    spelled = ChatFormat(chat_format.tokenizer, close="closed now")
    with pytest.raises(UserError, match=r"think_budget: 'closed now' is ordinary text"):
        SamplingParams.from_config(settings, spelled)
