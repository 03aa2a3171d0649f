"""A completion is the same text whatever it is decoded among, and however."""

import dataclasses
import gc
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from small_model import CONFIG, KEY, SAMPLED, made_requests, one_device
from two_processes import told_by_two

from cipo_jax.models.decoder import Compute
from cipo_jax.sampling import Sampler, SamplingJob, SamplingParams
from cipo_jax.training.mesh import make_mesh

LOGP_ATOL = 1e-4
GREEDY = SamplingParams(150, (3, 5))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def results(completions):
    """{(item, sample): (ids, why it ended)}, and log-probabilities beside them."""
    completions = list(completions)
    return (
        {(c.item, c.sample): (c.ids, c.stop) for c in completions},
        {(c.item, c.sample): c.logps for c in completions},
    )


@pytest.fixture(scope="module")
def wanted(params):
    """Three samples of each request, all of them decoded at once to the end."""
    sampler = Sampler(CONFIG, Compute(), one_device(), 64, decode_chunk=300)
    prepared = sampler.prepare(params)
    found = results(sampler.stream(prepared, SamplingJob(made_requests(), SAMPLED, KEY, 3)))
    greedy = results(sampler.stream(prepared, SamplingJob(made_requests(), GREEDY, KEY)))
    lengths = [len(ids) for ids, _ in found[0].values()]
    # Rings have grown and turned, and batches shrunk, by such lengths.
    assert min(lengths) < 10 and max(lengths) > 128 and len(lengths) == 57
    return found, greedy


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))]
)
def test_slots_chunks_and_order_do_not_show(params, wanted, seed):
    rng = random.Random(seed)
    rows, chunk = rng.choice([1, 3, 8, 20, 64]), rng.choice([1, 7, 32, 100])
    sampler = Sampler(CONFIG, Compute(), one_device(), rows, chunk)
    prepared = sampler.prepare(params)
    requests = made_requests()
    rng.shuffle(requests)
    # Some of the requests only: the others must not be missed.
    requests = requests[: rng.randint(5, 19)]
    for sampling_params, samples, (ids, logps) in (
        (SAMPLED, 3, wanted[0]), (SAMPLED, rng.choice([1, 2]), wanted[0]), (GREEDY, 1, wanted[1])
    ):  # fmt: skip
        found, found_logps = results(
            sampler.stream(prepared, SamplingJob(requests, sampling_params, KEY, samples))
        )
        assert found.keys() == {(r.item, s) for r in requests for s in range(samples)}
        assert found == {at: ids[at] for at in found}
        for at, values in found_logps.items():
            np.testing.assert_allclose(values, logps[at], rtol=0, atol=LOGP_ATOL)


@pytest.mark.parametrize("sizes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_a_mesh_does_not_show(params, wanted, sizes):
    sampler = Sampler(CONFIG, Compute(), make_mesh(*sizes), 16, 16)
    found, _ = results(
        sampler.stream(sampler.prepare(params), SamplingJob(made_requests(), SAMPLED, KEY, 3))
    )
    assert found == wanted[0][0]
    assert len(sampler.programs()) <= 8


def test_completions_come_as_they_finish(params, wanted):
    sampler = Sampler(CONFIG, Compute(), one_device(), 8, 8)
    order = [
        (c.item, c.sample)
        for c in sampler.stream(
            sampler.prepare(params), SamplingJob(made_requests(), SAMPLED, KEY, 3)
        )
    ]
    lengths = {at: len(ids) for at, (ids, _) in wanted[0][0].items()}
    longest = max(lengths, key=lambda at: lengths[at])
    # Whoever started beside the longest and was shorter is there before it.
    assert order.index(longest) > len(order) // 3
    assert sorted(order) == sorted(lengths)


def test_closing_the_stream_leaves_nothing_behind(params, wanted):
    sampler = Sampler(CONFIG, Compute(), one_device(), 8, 8)
    prepared = sampler.prepare(params)

    def alive():
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    before = alive()
    stream = sampler.stream(prepared, SamplingJob(made_requests(), SAMPLED, KEY, 3))
    first = next(stream)
    assert alive() > before + 8 * 64 * 128  # Caches are there,
    stream.close()
    assert alive() - before < 2**14  # and gone, but for a few numbers.
    assert (first.ids, first.stop) == wanted[0][0][first.item, first.sample]
    again, _ = results(sampler.stream(prepared, SamplingJob(made_requests(), GREEDY, KEY)))
    assert again == wanted[1][0]


def test_speed_is_measured_and_not_compared(params):
    sampler = Sampler(CONFIG, Compute(), one_device(), 8, 8)
    first, *_ = sampler.stream(sampler.prepare(params), SamplingJob(made_requests(3), GREEDY, KEY))
    assert first.tokens_per_second == len(first.ids) / first.seconds > 0
    assert dataclasses.replace(first, seconds=5.0) == first


@pytest.mark.slow
def test_two_processes_say_what_one_says(wanted):
    for printed in told_by_two(Path(__file__).with_name("sampling_process.py")):
        found = {(item, sample): (ids, stop) for item, sample, ids, stop in printed["completions"]}
        assert found == {at: wanted[0][0][at] for at in found}
        assert len(found) == 8 * 2
