"""The sampler: a job of requests in, completions out as they finish.

A completion depends on its own prompt, item number, sample number and key. The rows that share its
batch, their number and the order of the requests change the speed alone.
"""

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cipo_jax.models.decoder import Compute, DecoderConfig
from cipo_jax.sampling.job import Completion, ResolvedJob, SamplingJob
from cipo_jax.sampling.params import SamplingParams
from cipo_jax.sampling.programs import DeviceBatch, Programs, programs_for
from cipo_jax.sampling.scheduler import (
    BatchShape,
    InFlight,
    Insertions,
    Reshape,
    Scheduler,
    Task,
    prefill_batches,
)
from cipo_jax.sampling.state import IDLE, Chunk
from cipo_jax.training.mesh import replicated
from cipo_jax.typing import Params


class _Event(NamedTuple):
    """The state of a completion after decoding steps were collected.

    Attributes:
      task: which completion.
      completion: with all tokens so far.
      ended: whether this is all of it.
    """

    task: Task
    completion: Completion
    ended: bool


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples completions of prompts, up to `max_batch_size` at a time.

    Attributes:
      config: the model's shape.
      compute: dtype and kernels of decoding.
      mesh: rows lie over data x fsdp, heads over tensor.
      max_batch_size: completions decoded at a time, at most.
      decode_chunk: decoding steps between two looks of the host at the tokens, at most.
      int8_cache: whether keys and values are int8; changes the completions a little.
      sampling_params: of jobs that have none.
    """

    config: DecoderConfig
    compute: Compute
    mesh: Mesh
    max_batch_size: int = 64
    decode_chunk: int = 32
    int8_cache: bool = False
    sampling_params: SamplingParams | None = None
    _used_programs: set[str] = dataclasses.field(
        default_factory=set, init=False, repr=False, compare=False
    )

    def prepare(self, params: Params) -> Params:
        """Training layout (with or without adapters) -> decoding layout, on this sampler's mesh.

        Parameters on other devices, such as the first device alone, are copied to the mesh first.
        """
        devices = set(self.mesh.devices.flat)
        leaves = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
        if any(x.sharding.device_set != devices for x in leaves):
            params = jax.device_put(params, replicated(self.mesh))
        return self._programs.prepare(params)

    def sample(self, params: Params, job: SamplingJob) -> list[list[Completion]]:
        """The completions of each request, in order; arguments and errors as in `stream`."""
        completions = dict(self.stream_requests(params, job))
        return [completions[i] for i in range(len(job.requests))]

    def stream_requests(
        self, params: Params, job: SamplingJob
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yields (index of a request, its completions) when the last of them has ended.

        Arguments and errors as in `stream`.
        """
        unfinished: dict[int, dict[int, Completion]] = {}
        for task, completion, ended in self._events(params, job):
            if not ended:
                continue
            samples = unfinished.setdefault(task.request, {})
            samples[task.sample] = completion
            if len(samples) == job.num_samples:
                yield task.request, [samples[i] for i in range(job.num_samples)]
                del unfinished[task.request]

    def stream(self, params: Params, job: SamplingJob) -> Generator[Completion, None, None]:
        """Yields completions as they end.

        Closing the iterator ends the work; the device finishes the steps that were dispatched.
        With several processes all must make the same calls, and all get the same completions.

        Args:
          params: from `prepare`.
          job: what to sample.

        Raises:
          ValueError: the job is not valid; see `SamplingJob.resolve`.
        """
        events = self._events(params, job)
        return (completion for _, completion, ended in events if ended)

    def stream_parts(self, params: Params, job: SamplingJob) -> Iterator[Completion]:
        """Yields one completion as it grows, up to `decode_chunk` tokens at a time.

        The last one is the whole completion. Arguments and errors as in `stream`.

        Raises:
          ValueError: the job has more than one completion.
        """
        if len(job.requests) * job.num_samples != 1:
            raise ValueError("stream_parts takes a job of one request and one sample")
        return (completion for _, completion, _ in self._events(params, job))

    def programs(self) -> list[str]:
        """The decoding programs that this sampler has used, one line each."""
        return sorted(self._used_programs)

    def _events(self, params: Params, job: SamplingJob) -> Iterator[_Event]:
        resolved = job.resolve(self.sampling_params)
        return _JobRunner(self, params, resolved).events() if job.requests else iter(())

    @property
    def _programs(self) -> Programs:
        return programs_for(self.config, self.compute, self.mesh)

    @property
    def _num_shards(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def _min_rows(self) -> int:
        """XLA's CPU compiler is very slow at bfloat16 products of fewer rows."""
        cpu = self.mesh.devices.flat[0].platform == "cpu"
        return 8 if cpu and self.compute.dtype == "bfloat16" else 1


class _JobRunner:
    """Runs one job: applies the scheduler's decisions to the batch on the device."""

    def __init__(self, sampler: Sampler, params: Params, job: ResolvedJob):
        self._sampler, self._params, self._job = sampler, params, job
        self._on_device = job.sampling_params.on_device()
        # Key data on the host: with several processes each has to pass the key in.
        self._key = np.asarray(jax.random.key_data(job.key))
        self._scheduler = Scheduler(
            [len(prompt) for prompt in job.prompts],
            job.limits,
            job.num_samples,
            sampler.max_batch_size,
            sampler.decode_chunk,
            sampler._num_shards,
            sampler._min_rows,
        )
        self._completions: dict[Task, Completion] = {}
        self._start_times: dict[Task, float] = {}
        self._chunks: list[Chunk] = []
        self._batch = DeviceBatch(
            sampler._programs, self._on_device, sampler.int8_cache, self._scheduler.shape
        )

    def events(self) -> Iterator[_Event]:
        """Yields each completion that has new tokens or has ended, whenever steps are collected."""
        scheduler = self._scheduler
        while not scheduler.done:
            # While one chunk of steps is collected the next is under way.
            while len(scheduler.in_flight) < 2:
                self._refill()
                self._dispatch()
            yield from self._collect()

    # ---- host to device

    def _refill(self) -> None:
        insertions = self._scheduler.next_insertions()
        self._reshape(self._scheduler.grow_prompts(insertions))
        if insertions.start:
            self._insert(insertions)
        self._reshape(self._scheduler.next_reshape())

    def _insert(self, insertions: Insertions) -> None:
        sampler, shape = self._sampler, self._scheduler.shape
        prompts = [self._job.prompts[request] for request, _ in insertions.prefill]
        lengths = [len(prompt) for prompt in prompts]
        for chosen, rows, slots in prefill_batches(
            lengths, sampler.max_batch_size, sampler._num_shards
        ):
            into = np.full(rows, shape.groups, np.int32)
            ids = np.zeros((rows, slots), np.int32)
            real = np.ones(rows, np.int32)
            for row, i in enumerate(chosen):
                into[row], real[row] = insertions.prefill[i][1], lengths[i]
                ids[row, : lengths[i]] = prompts[i]
            self._batch.prefill(self._params, ids, real, into)
        if insertions.copy:
            source, into = np.full((2, shape.groups), shape.groups, np.int32)
            for i, (a, b) in enumerate(insertions.copy):
                source[i], into[i] = a, b
            self._batch.copy(np.minimum(source, shape.groups - 1), into)
        self._start(insertions.start)

    def _start(self, starts: Sequence[tuple[int, int, Task]]) -> None:
        shape, job = self._scheduler.shape, self._job
        by_row = (shape.groups, shape.width)
        start, closed = np.zeros((2, *by_row), bool)
        items, samples = np.zeros((2, *by_row), np.uint32)
        limits = np.zeros(by_row, np.int32)
        for group, row, task in starts:
            at, request = (group, row), job.requests[task.request]
            start[at] = True
            closed[at] = _contains(request.prefill, job.sampling_params.close_ids)
            sample = job.first_sample + task.sample
            items[at], samples[at] = request.item, sample
            limits[at] = job.limits[task.request]
            self._completions[task] = Completion(request.item, sample, [], [], [], "length", 0.0)
            self._start_times[task] = time.monotonic()
        self._batch.start(self._key, start, items, samples, limits, closed)

    def _reshape(self, reshape: Reshape | None) -> None:
        if reshape is not None:
            self._batch.reshape(self._scheduler.shape, reshape)
            self._scheduler.record_reshape(reshape)

    def _dispatch(self) -> None:
        sampler, scheduler = self._sampler, self._scheduler
        sampler._used_programs.add(_program_line(scheduler.shape, self._on_device))
        self._chunks.append(
            self._batch.decode(self._params, sampler.decode_chunk, scheduler.min_active())
        )
        scheduler.dispatch()

    # ---- device to host

    def _collect(self) -> Iterator[_Event]:
        flight: InFlight = self._scheduler.collect()
        chunk: Chunk = jax.device_get(self._chunks.pop(0))
        counts = (chunk.tokens != IDLE).sum(axis=-1)
        now = time.monotonic()
        ended_by_text = []
        for at, task in flight.tasks.items():
            count, active = int(counts[at]), bool(chunk.active[at])
            if not self._scheduler.is_running(task):
                continue
            completion = self._extended(task, chunk, at, count, now)
            ended = not active or completion.stop == "text"
            if active and ended:
                ended_by_text.append(self._scheduler.position(task))
            self._scheduler.record_tokens(task, count, ended)
            if ended:
                del self._completions[task], self._start_times[task]
            else:
                self._completions[task] = completion
            if count or ended:
                yield _Event(task, completion, ended)
        if ended_by_text:
            mask = np.zeros(self._scheduler.shape[:2], bool)
            mask[tuple(zip(*ended_by_text, strict=True))] = True
            self._batch.end(mask)

    def _extended(
        self, task: Task, chunk: Chunk, at: tuple[int, int], count: int, now: float
    ) -> Completion:
        """The completion with `count` more tokens of a chunk, cut after a stop text."""
        before = self._completions[task]
        completion = before.extended(
            chunk.tokens[at][:count].tolist(),
            chunk.logps[at][:count].tolist(),
            chunk.drawn_logps[at][:count].tolist(),
            now - self._start_times[task],
        )
        length = self._length_with_stop_text(completion.ids, len(before.ids))
        if length is not None:
            return completion.cut(length, "text")
        if not chunk.active[at] and completion.ids[-1] in self._job.sampling_params.stop_ids:
            return dataclasses.replace(completion, stop="id")
        return completion

    def _length_with_stop_text(self, ids: Sequence[int], searched: int) -> int | None:
        """Tokens up to the one that completes a stop text; `searched` tokens have none."""
        texts = self._job.sampling_params.stop_texts
        if not texts:
            return None
        assert self._job.detokenize is not None
        # A character takes up to four tokens, and the text before a token may change its own.
        window = 4 * max(map(len, texts)) + 8
        for end in range(searched + 1, len(ids) + 1):
            recent = self._job.detokenize(ids[max(end - window, 0) : end])
            if any(text in recent for text in texts):
                return end
        return None


def _contains(ids: Sequence[int], phrase: Sequence[int]) -> bool:
    starts = range(len(ids) - len(phrase) + 1)
    return bool(phrase) and any(list(ids[i : i + len(phrase)]) == list(phrase) for i in starts)


def _program_line(shape: BatchShape, sampling_params: SamplingParams) -> str:
    temperature = sampling_params.temperature
    drawing = "greedy" if temperature == 0.0 else f"temperature {temperature:g}"
    return (
        f"{shape.groups} x {shape.width} rows, {shape.prompt_slots} prompt slots, "
        f"{shape.ring_slots} response slots, {drawing}"
    )
