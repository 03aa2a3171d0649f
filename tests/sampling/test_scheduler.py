"""The scheduler with a simulated device, whose completions have random lengths."""

import random

import pytest

from cipo_jax.sampling.scheduler import (
    Scheduler,
    Task,
    halvings,
    prefill_batches,
    prompt_bucket,
)


def test_prompt_buckets_waste_less_than_half_and_are_few():
    sizes = {prompt_bucket(n) for n in range(1, 4097)}
    assert all(n <= prompt_bucket(n) < max(2 * n, 17) for n in range(1, 4097))
    assert len(sizes) == 16
    assert all(size % 16 == 0 for size in sizes)


@pytest.mark.parametrize(("top", "multiple", "sizes"), [
    (64, 1, [64, 32, 16, 8, 4, 2, 1]), (48, 1, [48, 24, 12, 6, 3, 2, 1]), (1, 1, [1]),
    (12, 4, [12, 8, 4]), (3, 4, [4]), (64, 8, [64, 32, 16, 8]),
])  # fmt: skip
def test_halvings(top, multiple, sizes):
    assert halvings(top, multiple) == sizes


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 9, 40, 64, 100])
def test_prefill_batches_hold_every_prompt_once_in_few_sizes(count, multiple):
    lengths = [random.Random(i).randint(1, 100) for i in range(count)]
    batches = prefill_batches(lengths, 64, multiple)
    assert sorted(i for part, _, _ in batches for i in part) == list(range(count))
    assert {size for _, size, _ in batches} <= {multiple, 8, 64}
    for part, size, slots in batches:
        assert len(part) <= size
        assert slots == prompt_bucket(max(lengths[i] for i in part))


def test_long_prompts_are_computed_few_at_a_time():
    for _, size, slots in prefill_batches([4000] * 64, 64):
        assert size * slots <= 8192


class Device:
    """Rows that decode; it knows only what is dispatched to it."""

    def __init__(self, scheduler, rng, lengths):
        self.scheduler, self.rng, self.lengths = scheduler, rng, lengths
        self.rows = {}  # (group, row) -> [task, tokens]
        self.prompts = {}  # group -> request
        self.ring = 0
        self.flights = []

    def insert(self, insertions):
        shape = self.scheduler.shape
        for request, group in insertions.prefill:
            assert 0 <= group < shape.groups
            assert not any(g == group for g, _ in self.rows), "a prompt that is in use was replaced"
            self.prompts[group] = request
        before = dict(self.prompts)  # All copies are read before any is written.
        for source, group in insertions.copy:
            assert not any(g == group for g, _ in self.rows)
            self.prompts[group] = before[source]
        for group, row, task in insertions.start:
            assert 0 <= group < shape.groups and 0 <= row < shape.width
            assert (group, row) not in self.rows, "a row was given away twice"
            assert self.prompts[group] == task.request
            self.rows[group, row] = [task, 0]

    def reshape(self, old, reshape):
        rows, prompts = {}, {}
        for group, olds in enumerate(reshape.rows):
            assert len(olds) == reshape.shape.width
            if reshape.groups[group] in self.prompts:
                prompts[group] = self.prompts[reshape.groups[group]]
            for row, place in enumerate(olds):
                if place >= 0 and divmod(place, old.width) in self.rows:
                    rows[group, row] = self.rows.pop(divmod(place, old.width))
        assert not self.rows, "a row that decodes was left behind"
        self.rows, self.prompts = rows, prompts

    def dispatch(self, chunk, min_active):
        shape, drawn, over = self.scheduler.shape, {}, set()
        for _ in range(chunk):
            if len(self.rows) <= max(min_active, 0):
                break
            for at, (task, tokens) in list(self.rows.items()):
                assert tokens <= shape.ring_slots, "the ring is too small"
                self.rows[at][1] = tokens + 1
                drawn[task] = drawn.get(task, 0) + 1
                if tokens + 1 == self.lengths[task]:
                    over.add(task)
                    del self.rows[at]
        self.flights.append((drawn, over))


@pytest.mark.parametrize("seed", range(40))
def test_every_completion_is_made_once_and_no_row_is_ever_in_two_hands(seed):
    rng = random.Random(seed)
    requests, samples = rng.randint(1, 30), rng.choice([1, 1, 2, 3, 8])
    rows, chunk = rng.choice([1, 3, 8, 48, 64]), rng.choice([1, 5, 32])
    shards, least = rng.choice([(1, 1), (1, 8), (4, 1)])
    limit = rng.choice([5, 90, 600])
    prompts = [rng.randint(1, 300) for _ in range(requests)]
    tasks = [Task(r, s) for r in range(requests) for s in range(samples)]
    lengths = {t: min(1 + int(rng.expovariate(1 / 60)), limit) for t in tasks}
    scheduler = Scheduler(prompts, [limit] * requests, samples, rows, chunk, shards, least)
    device = Device(scheduler, rng, lengths)
    made, shapes, flights = {}, [], 0

    def apply(reshape):
        device.reshape(scheduler.shape, reshape)
        scheduler.record_reshape(reshape)

    while not scheduler.done:
        while len(scheduler.in_flight) < 2:
            insertions = scheduler.next_insertions()
            if reshape := scheduler.grow_prompts(insertions):
                apply(reshape)
            device.insert(insertions)
            if reshape := scheduler.next_reshape():
                apply(reshape)
            shape = scheduler.shape
            shapes.append(shape)
            assert shape.groups % shards == 0
            assert least <= shape.rows <= max(rows, shards, least)
            held = [prompts[r] for r in device.prompts.values()]
            assert max(held, default=1) <= shape.prompt_slots
            min_active = scheduler.min_active()
            device.dispatch(chunk, min_active)
            scheduler.dispatch()
            flights += 1
        flight = scheduler.collect()
        drawn, over = device.flights.pop(0)
        assert set(drawn) <= set(flight.tasks.values())
        for task in flight.tasks.values():
            if scheduler.is_running(task):
                scheduler.record_tokens(task, drawn.get(task, 0), task in over)
                made[task] = made.get(task, 0) + drawn.get(task, 0)
        assert flights < 20 * (sum(lengths.values()) / chunk + len(tasks) + 10)
    assert made == lengths
    # It shrinks and grows along halvings, so that there are few programs.
    assert len({(s.groups, s.width) for s in shapes}) <= 12
    assert len(set(shapes)) <= 24


def test_samples_of_a_prompt_are_side_by_side_where_there_is_room():
    scheduler = Scheduler([10] * 8, [50] * 8, 8, 64, 32)
    insertions = scheduler.next_insertions()
    assert scheduler.shape[:2] == (8, 8)
    assert len(insertions.prefill) == 8 and len(insertions.start) == 64 and not insertions.copy


def test_where_requests_abound_a_row_takes_the_samples_of_its_prompt_one_after_another():
    scheduler = Scheduler([10] * 10, [50] * 10, 3, 4, 32)
    insertions = scheduler.next_insertions()
    assert scheduler.shape[:2] == (4, 1)
    assert [task.sample for _, _, task in insertions.start] == [0] * 4
    scheduler.dispatch()
    flight = scheduler.collect()
    for task in flight.tasks.values():
        scheduler.record_tokens(task, 3, True)
    again = scheduler.next_insertions()
    # No prompt is computed a second time.
    assert not again.prefill and [task.sample for _, _, task in again.start] == [1] * 4


def test_a_free_group_takes_over_samples_that_wait_elsewhere():
    scheduler = Scheduler([10], [50], 6, 4, 32)
    insertions = scheduler.next_insertions()
    assert len(insertions.prefill) == 1
    assert len(insertions.start) == min(6, scheduler.shape.rows)


def test_short_completions_never_change_the_shape():
    scheduler = Scheduler([10] * 70, [96] * 70, 1, 64, 32)
    shapes = set()
    while not scheduler.done:
        scheduler.next_insertions()
        assert scheduler.next_reshape() is None
        shapes.add(scheduler.shape)
        scheduler.dispatch()
        for task in scheduler.collect().tasks.values():
            scheduler.record_tokens(task, 30, True)
    assert len(shapes) == 1


def test_a_copy_is_never_copied_in_the_same_breath():
    scheduler = Scheduler([5] * 3, [1, 1, 40], 4, 3, 32)
    scheduler.next_insertions()
    scheduler.dispatch()
    # The first two requests are through at once; the third has samples waiting.
    insertions = None
    for _ in range(6):
        for task in [t for t in scheduler.running.values() if t.request < 2]:
            scheduler.record_tokens(task, 1, True)
        insertions = scheduler.next_insertions()
        if insertions.copy:
            break
    assert insertions is not None and len(insertions.copy) == 2
    assert {source for source, _ in insertions.copy} == {2}


@pytest.mark.parametrize(("requests", "samples"), [(1, 64), (4, 16), (2, 3), (2, 8), (100, 1)])
def test_a_mesh_gets_no_more_rows_than_planned_and_all_of_it_has_work(requests, samples):
    scheduler = Scheduler([5] * requests, [500] * requests, samples, 64, 32, 8)
    scheduler.next_insertions()
    assert scheduler.shape.rows <= 64
    per_shard = scheduler.shape.groups // 8
    busy = {group // per_shard for group, _ in scheduler.running}
    assert len(busy) == min(8, requests * samples)


def test_an_old_row_does_not_keep_the_batch_wide():
    scheduler = Scheduler([5] * 64, [2048] * 64, 1, 64, 32)
    scheduler.next_insertions()
    scheduler.dispatch()
    for n, task in enumerate(scheduler.collect().tasks.values()):
        scheduler.record_tokens(task, {0: 1950, 1: 10}.get(n, 5), n > 1)
    reshape = scheduler.next_reshape()
    assert reshape is not None and reshape.shape.rows == 2


def test_a_batch_may_be_wanted_no_smaller_than_it_has_to_be():
    assert Scheduler([5] * 3, [96] * 3, 1, 64, 32, min_rows=8).shape.rows == 8
    assert Scheduler([5], [96], 1, 1, 32, min_rows=8).shape.rows == 8
    scheduler = Scheduler([5] * 2, [2048] * 2, 8, 16, 32, min_rows=8)
    scheduler.next_insertions()
    assert scheduler.shape[:2] == (2, 8)
    scheduler.dispatch()
    for task in scheduler.collect().tasks.values():
        scheduler.record_tokens(task, 5, task.sample > 0)
    reshape = scheduler.next_reshape()
    assert reshape is not None and reshape.shape.rows == 8
