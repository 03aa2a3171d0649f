"""The sampler's scheduler: which completion decodes in which row. It works without arrays.

Requests wait in a queue. A free group takes the prompt of the next request, and its rows decode the
samples of it, one after another. A group that finds the queue empty takes over samples that wait in
another group. When nothing waits any more the batch shrinks. The host learns with a delay how far
the device has come, so every decision here holds for all that the device may have done meanwhile.
"""

import dataclasses
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

_INITIAL_RING_SLOTS = 128
_MIN_PROMPT_SLOTS = 128  # Prompts shorter than this are not worth a change of shape.
# Rows, as a share of the batch, that may be idle before the device stops to have them refilled.
_IDLE_SHARE = 8
PREFILL_TOKENS = 8192  # of prompts that are computed at a time, if there is more than one
# A smaller batch is another program: completions must be allowed this many tokens to be worth it.
_MIN_LIMIT_TO_SHRINK = 128


class Task(NamedTuple):
    """One completion to sample: index of its request, and index among the request's samples."""

    request: int
    sample: int


class BatchShape(NamedTuple):
    """Sizes of a batch; each shape has a compiled program of its own."""

    groups: int
    width: int
    prompt_slots: int
    ring_slots: int

    @property
    def rows(self) -> int:
        return self.groups * self.width


class Insertions(NamedTuple):
    """Prompts and completions that enter a batch.

    Attributes:
      prefill: (request, group) of prompts to compute.
      copy: (from group, to group) of prompts to copy.
      start: (group, row, task) of completions to start.
    """

    prefill: list[tuple[int, int]]
    copy: list[tuple[int, int]]
    start: list[tuple[int, int, Task]]


class Reshape(NamedTuple):
    """How a batch of another shape is made from the present one.

    Attributes:
      shape: the new shape.
      groups: for each new group the old one.
      rows: for each new (group, row) the old index in groups x width; -1 for none.
    """

    shape: BatchShape
    groups: list[int]
    rows: list[list[int]]


@dataclasses.dataclass(frozen=True)
class InFlight:
    """Decoding steps that were dispatched and not collected yet.

    Attributes:
      tasks: the completion at each (group, row).
    """

    tasks: dict[tuple[int, int], Task]


def prompt_bucket(length: int) -> int:
    """The padded length of a prompt: 16, 32, 48, 64, 96, 128, ..."""
    size = 16
    while size < length:
        size *= 2
    return size * 3 // 4 if size >= 64 and length <= size * 3 // 4 else size


def halvings(top: int, multiple: int = 1) -> list[int]:
    """`top` and its halves, down to `multiple`, each rounded up to a multiple; largest first."""
    sizes = []
    while True:
        sizes.append(-(-top // multiple) * multiple)
        if top <= multiple:
            return list(dict.fromkeys(sizes))
        top = -(-top // 2)


def prefill_batches(
    lengths: Sequence[int], max_batch_size: int, multiple: int = 1
) -> list[tuple[list[int], int, int]]:
    """Divides prompts into batches of at most three sizes: all rows, those of a refill, and one.

    Args:
      lengths: of the prompts.
      max_batch_size: rows that decode at a time.
      multiple: every size is a multiple of it.

    Returns:
      (indices of the prompts, padded number of prompts, padded length) of each batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    counts = (1, max_batch_size // _IDLE_SHARE or 1, max_batch_size)
    batches = []
    while order:
        longest = prompt_bucket(lengths[order[-1]])
        sizes = sorted({-(-m // multiple) * multiple for m in counts})
        sizes = [m for m in sizes if m * longest <= PREFILL_TOKENS] or sizes[:1]
        # A little padding costs less than another batch.
        size = next((m for m in sizes if m >= len(order) >= 0.6 * m), None)
        size = size or max((m for m in sizes if m <= len(order)), default=sizes[0])
        chosen, order = order[-size:], order[:-size]
        batches.append((chosen, size, longest))
    return batches


class Scheduler:
    """The state of a batch, as far as the host knows it.

    Args:
      lengths: tokens of each request's prompt, at least 1.
      limits: greatest number of new tokens of each request's completions.
      num_samples: completions of each request.
      max_batch_size: rows that decode at a time, at most.
      decode_chunk: decoding steps that are dispatched at a time, at most.
      num_shards: devices that the groups are divided over; the number of groups is a multiple.
      min_rows: the batch has at least this many rows.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        limits: Sequence[int],
        num_samples: int,
        max_batch_size: int,
        decode_chunk: int,
        num_shards: int = 1,
        min_rows: int = 1,
    ):
        self._lengths, self._limits, self._num_samples = lengths, limits, num_samples
        self._decode_chunk, self._num_shards, self._min_rows = decode_chunk, num_shards, min_rows
        self._max_ring_slots = -(-max(limits) // 16) * 16
        # Short prompts first: all rows pay for the longest prompt of the batch.
        self._queue = deque(sorted(range(len(lengths)), key=lambda i: prompt_bucket(lengths[i])))
        self._waiting: dict[int, deque[int]] = {}  # samples of requests that have a group
        self.shape = self._initial_shape(max(max_batch_size, num_shards, min_rows))
        self._request_of: list[int | None] = [None] * self.shape.groups
        self._running: dict[tuple[int, int], Task] = {}
        self._counts: dict[Task, int] = {}
        self.in_flight: deque[InFlight] = deque()

    def _initial_shape(self, max_rows: int) -> BatchShape:
        requests, shards = len(self._lengths), self._num_shards
        completions, width = requests * self._num_samples, 1
        # All shards get completions, though samples of a prompt then share no group.
        per_shard = -(-completions // shards)
        widest = min(self._num_samples, max_rows // max(requests, shards), per_shard)
        while 2 * width <= widest:
            width *= 2
        needed = max(-(-completions // width), -(-self._min_rows // width))
        sizes = halvings(max(max_rows // width // shards * shards, shards), shards)
        groups = ([g for g in sizes if g >= needed] or sizes[:1])[-1]
        first = max(self._lengths[i] for i in list(self._queue)[:groups])
        longest = prompt_bucket(max(self._lengths))
        prompt_slots = max(prompt_bucket(first), min(longest, _MIN_PROMPT_SLOTS))
        return BatchShape(groups, width, prompt_slots, self._ring_slots(1))

    def _ring_slots(self, count: int) -> int:
        size = _INITIAL_RING_SLOTS
        while size < count:
            size *= 2
        return min(size, self._max_ring_slots)

    @property
    def running(self) -> dict[tuple[int, int], Task]:
        """The completion at each (group, row)."""
        return self._running

    @property
    def done(self) -> bool:
        return not (self._running or self._any_waiting)

    @property
    def _any_waiting(self) -> bool:
        """Whether any completion has not started yet."""
        return bool(self._queue) or any(self._waiting.values())

    # ---- insertions

    def next_insertions(self) -> Insertions:
        """Assigns waiting completions to free rows."""
        insertions = Insertions([], [], [])
        groups, width = self.shape.groups, self.shape.width
        free = {g: [r for r in range(width) if (g, r) not in self._running] for g in range(groups)}
        for group in range(groups):
            self._start(group, free[group], insertions)
        for group in range(groups):
            if len(free[group]) < width:
                continue
            if self._queue:
                request = self._queue.popleft()
                self._waiting[request] = deque(range(self._num_samples))
                insertions.prefill.append((request, group))
            else:
                # All copies are read before any is written: a copy is never copied.
                source = self._fullest_group({group, *(into for _, into in insertions.copy)})
                if source is None:
                    continue
                request = self._request_of[source]
                insertions.copy.append((source, group))
            self._request_of[group] = request
            self._start(group, free[group], insertions)
        return insertions

    def _start(self, group: int, free: list[int], insertions: Insertions) -> None:
        request = self._request_of[group]
        waiting = self._waiting.get(request) if request is not None else None
        while free and waiting:
            assert request is not None
            row, task = free.pop(0), Task(request, waiting.popleft())
            self._running[group, row] = task
            self._counts[task] = 0
            insertions.start.append((group, row, task))

    def _fullest_group(self, excluded: set[int]) -> int | None:
        """The group of the request with the most samples waiting."""
        candidates = [
            (len(self._waiting.get(request, ())), -group)
            for group, request in enumerate(self._request_of)
            if request is not None and group not in excluded
        ]
        most, group = max(candidates, default=(0, 0))
        return -group if most else None

    # ---- shape

    def grow_prompts(self, insertions: Insertions) -> Reshape | None:
        """The shape with room for the inserted prompts; None if the present one has room."""
        entering = (prompt_bucket(self._lengths[request]) for request, _ in insertions.prefill)
        slots = max(entering, default=0)
        if slots <= self.shape.prompt_slots:
            return None
        return self._reshape(range(self.shape.groups), self.shape._replace(prompt_slots=slots))

    def next_reshape(self) -> Reshape | None:
        """The shape that the next decoding steps need, or a much smaller one; None to keep it."""
        shape = self.shape
        # The most tokens that each may have drawn after the next steps and those in flight.
        chunks = Counter(task for flight in self.in_flight for task in flight.tasks.values())
        most = (
            min(self._counts[t] + self._decode_chunk * (chunks[t] + 1), self._limits[t.request])
            for t in self._running.values()
        )
        ring_slots = self._ring_slots(max(most, default=1))
        if self._may_shrink:
            by_group = Counter(group for group, _ in self._running)
            smaller = self._smaller(len(by_group), max(by_group.values(), default=1))
            if smaller is not None:
                idle = [g for g in range(shape.groups) if g not in by_group]
                kept = sorted((sorted(by_group) + idle)[: smaller[0]])
                groups, width = smaller
                shape = shape._replace(groups=groups, width=width, ring_slots=ring_slots)
                return self._reshape(kept, shape)
        if ring_slots <= shape.ring_slots:
            return None
        return self._reshape(range(shape.groups), shape._replace(ring_slots=ring_slots))

    def _reshape(self, groups: Sequence[int], shape: BatchShape) -> Reshape:
        rows = []
        for group in groups:
            old = sorted(row for g, row in self._running if g == group)
            if shape.width == self.shape.width:
                old = list(range(shape.width))  # Rows keep their positions.
            positions = [group * self.shape.width + row for row in old]
            rows.append(positions + [-1] * (shape.width - len(positions)))
        return Reshape(shape, list(groups), rows)

    @property
    def _may_shrink(self) -> bool:
        """Whether nothing waits and completions may be long enough for smaller batches to pay."""
        return not self._any_waiting and max(self._limits) >= _MIN_LIMIT_TO_SHRINK

    def _smaller(self, groups: int, width: int) -> tuple[int, int] | None:
        """The smallest (groups, width) with room for so many, if at most half the present one."""
        shape, fitting = self.shape, []
        narrow = 1 << (width - 1).bit_length()
        while narrow <= shape.width:
            need = max(groups, -(-self._min_rows // narrow))
            few = [g for g in halvings(shape.groups, self._num_shards) if g >= need]
            fitting += [(few[-1], narrow)] if few else []
            narrow *= 2
        best = min(fitting, key=lambda size: size[0] * size[1], default=shape[:2])
        return best if 2 * best[0] * best[1] <= shape.rows else None

    def record_reshape(self, reshape: Reshape) -> None:
        """Records that the batch has another shape."""
        positions = {
            divmod(old, self.shape.width): (group, row)
            for group, olds in enumerate(reshape.rows)
            for row, old in enumerate(olds)
            if old >= 0
        }
        self._running = {positions[at]: task for at, task in self._running.items()}
        self._request_of = [self._request_of[g] for g in reshape.groups]
        self.shape = reshape.shape

    # ---- dispatch and collection of decoding steps

    def min_active(self) -> int:
        """The number of active rows at which the next decoding steps stop early."""
        active, rows = len(self._running), self.shape.rows
        if self._any_waiting:
            return active - max(rows // _IDLE_SHARE, 1)
        if self._may_shrink and rows > max(self._min_rows, self._num_shards):
            return min(rows // 2, active - max(active // 4, 1))
        return 0

    def dispatch(self) -> None:
        """Records that decoding steps were dispatched."""
        self.in_flight.append(InFlight(dict(self._running)))

    def collect(self) -> InFlight:
        """Removes and returns the oldest decoding steps in flight."""
        return self.in_flight.popleft()

    def record_tokens(self, task: Task, count: int, ended: bool) -> None:
        """Records that a completion has `count` more tokens, and whether it has ended."""
        self._counts[task] += count
        if ended:
            del self._counts[task]
            self._running = {at: t for at, t in self._running.items() if t != task}

    def position(self, task: Task) -> tuple[int, int]:
        """The (group, row) of a completion."""
        return next(at for at, t in self._running.items() if t == task)

    def is_running(self, task: Task) -> bool:
        return task in self._counts
