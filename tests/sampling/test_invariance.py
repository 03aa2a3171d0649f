"""A completion is the same text whatever it is decoded among, and however."""

import dataclasses
import gc
import json
import random
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params
from cipo_jax.sampling.decode import Rules
from cipo_jax.sampling.sampler import Request, Sampler
from cipo_jax.training.mesh import make_mesh

CONFIG = DecoderConfig(
    vocab_size=64, d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2, head_dim=8, tied_head=True
)
KEY = jax.random.key(11)
LOGP_ATOL = 1e-4
SAMPLED = Rules(300, (3, 5), 1.0, 0.95)
GREEDY = Rules(150, (3, 5))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def made_params():
    rng = np.random.default_rng(0)

    def one(path, x):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, 0.3, x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_params(CONFIG))


def made_requests(count=19):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 70, count)
    return [Request(rng.integers(0, 64, n).tolist(), 100 + 7 * i) for i, n in enumerate(lengths)]


def told(completions):
    """{(item, sample): (ids, why it ended)}, and log-probabilities beside them."""
    completions = list(completions)
    return (
        {(c.item, c.sample): (c.ids, c.stop) for c in completions},
        {(c.item, c.sample): c.logps for c in completions},
    )


def one_device():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def params():
    return made_params()


@pytest.fixture(scope="module")
def wanted(params):
    """Three samples of each request, all of them decoded at once to the end."""
    sampler = Sampler(CONFIG, Compute(), one_device(), 64, chunk=300)
    prepared = sampler.prepare(params)
    found = told(sampler.stream(prepared, made_requests(), SAMPLED, KEY, 3))
    greedy = told(sampler.stream(prepared, made_requests(), GREEDY, KEY))
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
    for rules, samples, (ids, logps) in (
        (SAMPLED, 3, wanted[0]), (SAMPLED, rng.choice([1, 2]), wanted[0]), (GREEDY, 1, wanted[1])
    ):  # fmt: skip
        found, found_logps = told(sampler.stream(prepared, requests, rules, KEY, samples))
        assert found.keys() == {(r.item, s) for r in requests for s in range(samples)}
        assert found == {at: ids[at] for at in found}
        for at, values in found_logps.items():
            np.testing.assert_allclose(values, logps[at], rtol=0, atol=LOGP_ATOL)


@pytest.mark.parametrize("sizes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_a_mesh_does_not_show(params, wanted, sizes):
    sampler = Sampler(CONFIG, Compute(), make_mesh(*sizes), 16, 16)
    found, _ = told(sampler.stream(sampler.prepare(params), made_requests(), SAMPLED, KEY, 3))
    assert found == wanted[0][0]
    assert len(sampler.programs()) <= 8


def test_completions_come_as_they_finish(params, wanted):
    sampler = Sampler(CONFIG, Compute(), one_device(), 8, 8)
    order = [
        (c.item, c.sample)
        for c in sampler.stream(sampler.prepare(params), made_requests(), SAMPLED, KEY, 3)
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
    stream = sampler.stream(prepared, made_requests(), SAMPLED, KEY, 3)
    first = next(stream)
    assert alive() > before + 8 * 64 * 128  # Caches are there,
    stream.close()
    assert alive() - before < 2**14  # and gone, but for a few numbers.
    assert (first.ids, first.stop) == wanted[0][0][first.item, first.sample]
    again, _ = told(sampler.stream(prepared, made_requests(), GREEDY, KEY))
    assert again == wanted[1][0]


def test_speed_is_told_and_does_not_count_in_comparisons(params):
    sampler = Sampler(CONFIG, Compute(), one_device(), 8, 8)
    first, *_ = sampler.stream(sampler.prepare(params), made_requests(3), GREEDY, KEY)
    assert first.tokens_per_second == len(first.ids) / first.seconds > 0
    assert dataclasses.replace(first, seconds=5.0) == first


@pytest.mark.slow
def test_two_processes_say_what_one_says(wanted):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    script = Path(__file__).with_name("sampling_process.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(i)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    for output, _ in outputs:
        (line,) = [line for line in output.splitlines() if line.startswith("[[")]
        found = {(item, sample): (ids, stop) for item, sample, ids, stop in json.loads(line)}
        assert found == {at: wanted[0][0][at] for at in found}
        assert len(found) == 8 * 2
