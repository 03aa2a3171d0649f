"""Who decodes where: the host's book-keeping of the sampler, without a single array.

Requests wait in a queue. A group takes the next one's prompt and its rows take the samples of it,
one after another; a group that finds the queue empty takes over samples that others still have
waiting. When nothing waits any more the batch shrinks. What the device does in the meantime is
known with a delay, so everything here holds for whatever it may have done.
"""

import dataclasses
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

_RING = 128  # slots that a ring starts with
_PROMPT = 128  # prompt slots that are worth no change of shape
# Rows, as a share of the batch, that may stand idle before the device stops to have them refilled.
_IDLE_SHARE = 8
PREFILL_TOKENS = 8192  # of prompts that are computed at a time, where there is more than one
# A smaller batch is another program: completions have to be allowed so many tokens to be worth it.
_WORTH_SHRINKING = 128


class Task(NamedTuple):
    """One completion to be made."""

    request: int
    sample: int


class Shape(NamedTuple):
    """Sizes of a batch, which are those of its compiled program."""

    groups: int
    width: int
    prompt_slots: int
    ring_slots: int

    @property
    def rows(self) -> int:
        return self.groups * self.width


class Admission(NamedTuple):
    """What is to enter a batch.

    Attributes:
      prefill: (request, group) whose prompts are to be computed.
      copy: (from group, to group) whose prompts are to be copied.
      start: (group, row, task) that start.
    """

    prefill: list[tuple[int, int]]
    copy: list[tuple[int, int]]
    start: list[tuple[int, int, Task]]


class Move(NamedTuple):
    """How a batch of another shape is made of the present one.

    Attributes:
      shape: the new one.
      groups: for each new group the old one.
      rows: for each new (group, row) the old index in groups x width; -1 for none.
    """

    shape: Shape
    groups: list[int]
    rows: list[list[int]]


def prompt_bucket(length: int) -> int:
    """The padded length of a prompt: 16, 32, 48, 64, 96, 128, ..."""
    size = 16
    while size < length:
        size *= 2
    return size * 3 // 4 if size >= 64 and length <= size * 3 // 4 else size


def ladder(top: int, multiple: int = 1) -> list[int]:
    """`top` and its halves, down to `multiple`, each rounded up to a multiple; largest first."""
    sizes = []
    while True:
        sizes.append(-(-top // multiple) * multiple)
        if top <= multiple:
            return list(dict.fromkeys(sizes))
        top = -(-top // 2)


def prefill_batches(
    lengths: Sequence[int], rows: int, multiple: int = 1
) -> list[tuple[list[int], int, int]]:
    """Cuts prompts into batches of few different sizes: all rows, those of a refill, and one.

    Args:
      lengths: of the prompts.
      rows: that decode at a time.
      multiple: that the size of a batch is to be of.

    Returns:
      (indices of the prompts, padded number of prompts, padded length) of each batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches = []
    while order:
        longest = prompt_bucket(lengths[order[-1]])
        sizes = sorted({-(-m // multiple) * multiple for m in (1, rows // _IDLE_SHARE or 1, rows)})
        sizes = [m for m in sizes if m * longest <= PREFILL_TOKENS] or sizes[:1]
        # Padding a little costs less than another batch.
        size = next((m for m in sizes if m >= len(order) >= 0.6 * m), None)
        size = size or max((m for m in sizes if m <= len(order)), default=sizes[0])
        part, order = order[-size:], order[:-size]
        batches.append((part, size, longest))
    return batches


@dataclasses.dataclass
class Flight:
    """Decoding steps that were ordered and not looked at yet: who was at which (group, row)."""

    tasks: dict[tuple[int, int], Task]


class Schedule:
    """The state of a batch, as far as the host knows it.

    Args:
      lengths: tokens of each request's prompt, at least 1.
      limits: tokens after which the completions of each request end.
      samples: completions of each request.
      rows: that decode at a time, at most.
      chunk: decoding steps in a flight, at most.
      shards: the mesh's rows, of which the number of groups is a multiple.
      least_rows: the batch shrinks to no fewer.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        limits: Sequence[int],
        samples: int,
        rows: int,
        chunk: int,
        shards: int = 1,
        least_rows: int = 1,
    ):
        self._lengths, self._limits, self._samples = lengths, limits, samples
        self._chunk, self._shards, self._least = chunk, shards, least_rows
        self._longest_ring = -(-max(limits) // 16) * 16
        # Short prompts first: the batch pays for the longest that has come.
        self._queue = deque(sorted(range(len(lengths)), key=lambda i: prompt_bucket(lengths[i])))
        self._waiting: dict[int, deque[int]] = {}  # samples of requests that have a group
        rows = max(rows, shards, least_rows)
        width = 1
        a_shard = -(-len(lengths) * samples // shards)  # Samples of a prompt may be spread thin.
        while 2 * width <= min(samples, rows // max(len(lengths), shards), a_shard):
            width *= 2
        needed = max(-(-len(lengths) * samples // width), -(-least_rows // width))
        sizes = ladder(max(rows // width // shards * shards, shards), shards)
        groups = [g for g in sizes if g >= needed] or sizes[:1]
        first = max(lengths[i] for i in list(self._queue)[: groups[-1]])
        prompt_slots = max(prompt_bucket(first), min(prompt_bucket(max(lengths)), _PROMPT))
        self.shape = Shape(groups[-1], width, prompt_slots, self._ring(1))
        self._held: list[int | None] = [None] * self.shape.groups
        self._at: dict[tuple[int, int], Task] = {}
        self._counts: dict[Task, int] = {}
        self.flights: deque[Flight] = deque()

    def _ring(self, count: int) -> int:
        size = _RING
        while size < count:
            size *= 2
        return min(size, self._longest_ring)

    @property
    def running(self) -> dict[tuple[int, int], Task]:
        """Who is at which (group, row)."""
        return self._at

    @property
    def done(self) -> bool:
        return not (self._at or self._waits)

    @property
    def _waits(self) -> bool:
        """Whether anything is still to be started."""
        return bool(self._queue) or any(self._waiting.values())

    # ---- what enters

    def admit(self) -> Admission:
        """Gives free rows something to do."""
        admission = Admission([], [], [])
        groups, width = self.shape.groups, self.shape.width
        free = {g: [r for r in range(width) if (g, r) not in self._at] for g in range(groups)}
        for group in range(groups):
            self._start(group, free[group], admission)
        for group in range(groups):
            if len(free[group]) < width:
                continue
            if self._queue:
                request = self._queue.popleft()
                self._waiting[request] = deque(range(self._samples))
                admission.prefill.append((request, group))
            else:
                # What is copied is read before anything is written: no copy of a copy.
                source = self._richest({group, *(into for _, into in admission.copy)})
                if source is None:
                    continue
                request = self._held[source]
                admission.copy.append((source, group))
            self._held[group] = request
            self._start(group, free[group], admission)
        return admission

    def _start(self, group: int, free: list[int], admission: Admission) -> None:
        request = self._held[group]
        waiting = self._waiting.get(request) if request is not None else None
        while free and waiting:
            assert request is not None
            row, task = free.pop(0), Task(request, waiting.popleft())
            self._at[group, row] = task
            self._counts[task] = 0
            admission.start.append((group, row, task))

    def _richest(self, without: set[int]) -> int | None:
        """The group of the request that has most samples waiting."""
        holders = [
            (len(self._waiting.get(request, ())), -group)
            for group, request in enumerate(self._held)
            if request is not None and group not in without
        ]
        most, group = max(holders, default=(0, 0))
        return -group if most else None

    # ---- what shape it has

    def widen(self, admission: Admission) -> Move | None:
        """The shape that has room for the prompts that enter; None where the present one has."""
        entering = (prompt_bucket(self._lengths[request]) for request, _ in admission.prefill)
        slots = max(entering, default=0)
        if slots <= self.shape.prompt_slots:
            return None
        return self._move(range(self.shape.groups), self.shape._replace(prompt_slots=slots))

    def move(self) -> Move | None:
        """The shape that the next flight needs, or that is worth changing to; None to stay."""
        shape = self.shape
        # What each will have drawn at most once the next flight, and those before it, are over.
        flights = Counter(task for flight in self.flights for task in flight.tasks.values())
        most = (
            min(self._counts[t] + self._chunk * (flights[t] + 1), self._limits[t.request])
            for t in self._at.values()
        )
        ring = self._ring(max(most, default=1))
        if self._may_shrink:
            by_group = Counter(group for group, _ in self._at)
            smaller = self._smaller(len(by_group), max(by_group.values(), default=1))
            if smaller is not None:
                idle = [g for g in range(shape.groups) if g not in by_group]
                kept = sorted((sorted(by_group) + idle)[: smaller[0]])
                groups, width = smaller
                shape = shape._replace(groups=groups, width=width, ring_slots=ring)
                return self._move(kept, shape)
        if ring <= shape.ring_slots:
            return None
        return self._move(range(shape.groups), shape._replace(ring_slots=ring))

    def _move(self, groups: Sequence[int], shape: Shape) -> Move:
        rows = []
        for group in groups:
            old = sorted(row for g, row in self._at if g == group)
            if shape.width == self.shape.width:
                old = list(range(shape.width))  # Rows stay where they are.
            places = [group * self.shape.width + row for row in old]
            rows.append(places + [-1] * (shape.width - len(places)))
        return Move(shape, list(groups), rows)

    @property
    def _may_shrink(self) -> bool:
        """Whether nothing waits, and completions may be long enough for smaller batches to pay."""
        return not self._waits and max(self._limits) >= _WORTH_SHRINKING

    def _smaller(self, groups: int, width: int) -> tuple[int, int] | None:
        """The smallest (groups, width) that has room for so many, if it is half the present one."""
        shape, fitting = self.shape, []
        narrow = 1 << (width - 1).bit_length()
        while narrow <= shape.width:
            need = max(groups, -(-self._least // narrow))
            few = [g for g in ladder(shape.groups, self._shards) if g >= need]
            fitting += [(few[-1], narrow)] if few else []
            narrow *= 2
        best = min(fitting, key=lambda size: size[0] * size[1], default=shape[:2])
        return best if 2 * best[0] * best[1] <= shape.rows else None

    def moved(self, move: Move) -> None:
        """Takes note that the batch has another shape."""
        places = {
            divmod(old, self.shape.width): (group, row)
            for group, olds in enumerate(move.rows)
            for row, old in enumerate(olds)
            if old >= 0
        }
        self._at = {places[at]: task for at, task in self._at.items()}
        self._held = [self._held[g] for g in move.groups]
        self.shape = move.shape

    # ---- what goes out and comes back

    def floor(self) -> int:
        """Active rows at which the next flight is to stop, for the host to do something."""
        active, rows = len(self._at), self.shape.rows
        if self._waits:
            return active - max(rows // _IDLE_SHARE, 1)
        if self._may_shrink and rows > max(self._least, self._shards):
            return min(rows // 2, active - max(active // 4, 1))
        return 0

    def fly(self) -> None:
        """Takes note that decoding steps were ordered."""
        self.flights.append(Flight(dict(self._at)))

    def land(self) -> Flight:
        """The oldest flight, which is being looked at."""
        return self.flights.popleft()

    def drew(self, task: Task, count: int, over: bool) -> None:
        """Takes note that a task has drawn so many tokens more, and whether it is over."""
        self._counts[task] += count
        if over:
            del self._counts[task]
            self._at = {at: t for at, t in self._at.items() if t != task}

    def place(self, task: Task) -> tuple[int, int]:
        """Where a task is, (group, row)."""
        return next(at for at, t in self._at.items() if t == task)

    def goes_on(self, task: Task) -> bool:
        return task in self._counts
