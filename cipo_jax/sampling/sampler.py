"""The sampler as a library: requests in, completions out as they finish.

A completion depends on its own prompt, item id, sample index and seed; which rows share its batch,
how many there are and in what order they come is a matter of speed.
"""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cipo_jax.errors import UserError
from cipo_jax.models.decoder import Compute, DecoderConfig
from cipo_jax.sampling import decode as device
from cipo_jax.sampling.decode import SamplingParams
from cipo_jax.sampling.programs import Batch, Programs
from cipo_jax.sampling.schedule import Admission, Move, Schedule, Shape, Task, prefill_batches
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.training.mesh import replicated
from cipo_jax.typing import Array, Params

Stop = Literal["id", "text", "length"]
Detokenize = Callable[[Sequence[int]], str]


class Request(NamedTuple):
    """A prompt to complete.

    Attributes:
      prompt: its token ids.
      item: the id that its randomness is addressed by.
      prefill: how the completion is made to begin; it is not part of what is returned.
      max_new_tokens: where it differs from that of the rules.
    """

    prompt: Sequence[int]
    item: int
    prefill: Sequence[int] = ()
    max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled row.

    Attributes:
      item: of its request.
      sample: its number among the samples of its request.
      ids: the token ids that were drawn, its stop id included.
      logps: their log-probabilities under the model at temperature 1.
      drawn_logps: those under the distribution that they were drawn from.
      stop: why it ended.
      seconds: from its start to its end, as the host saw them.
    """

    item: int
    sample: int
    ids: list[int]
    logps: list[float]
    drawn_logps: list[float]
    stop: Stop
    seconds: float = dataclasses.field(compare=False)

    @property
    def stopped(self) -> bool:
        """Whether it came to an end of its own, rather than to the greatest length."""
        return self.stop != "length"

    @property
    def tokens_per_second(self) -> float:
        return len(self.ids) / self.seconds if self.seconds else 0.0


def rules_of(
    format: ChatFormat,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    **more: Any,
) -> SamplingParams:
    """Sampling parameters that end where a model's text ends, and draw nothing that its tokenizer lacks.

    Raises:
      UserError: for a think budget where the closing tag is no token of its own: such a tag may
        share tokens with what follows, so that the sampler could not tell a closed block.
    """
    if more.get("think_budget") and not format.close_is_token:
        raise UserError(
            f"config.sampling.think_budget: {format.close!r} is ordinary text to this tokenizer, "
            "not a token; a thinking budget needs a closing tag that is one"
        )
    return SamplingParams(
        max_new_tokens,
        format.stop_ids,
        temperature,
        top_p,
        format.vocabulary,
        close_ids=tuple(format.close_ids),
        **more,
    )


def rules_of_settings(
    format: ChatFormat, settings: Any, stop_texts: Sequence[str] = ()
) -> SamplingParams:
    """The rules that a config.SamplingConfig asks for."""
    return rules_of(
        format,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        think_budget=settings.think_budget,
        stop_texts=tuple(stop_texts),
    )


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples completions of prompts, up to `rows` at a time.

    Attributes:
      config: the model's shape.
      compute: dtype and kernels of decoding.
      mesh: where rows (data x fsdp) and heads (tensor) lie.
      rows: completions decoded at a time, at most.
      chunk: decoding steps that the device makes before the host looks at them.
      int8_cache: whether keys and values are kept as int8; changes what is drawn a little.
      rules: how to draw and when to stop, where a call does not say.
    """

    config: DecoderConfig
    compute: Compute
    mesh: Mesh
    rows: int = 64
    chunk: int = 32
    int8_cache: bool = False
    rules: SamplingParams | None = None

    def prepare(self, params: Params) -> Params:
        """Training layout (and adapters) -> decoding layout, on this sampler's mesh.

        Parameters that lie elsewhere, such as on the first device alone, are copied there first.
        """
        devices = set(self.mesh.devices.flat)
        leaves = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
        if any(x.sharding.device_set != devices for x in leaves):
            params = jax.device_put(params, replicated(self.mesh))
        return self._programs.prepare(params)

    def sample(
        self,
        params: Params,
        requests: Sequence[Request],
        rules: SamplingParams | None = None,
        key: Array | None = None,
        samples: int = 1,
        detokenize: Detokenize | None = None,
    ) -> list[list[Completion]]:
        """The completions of each request, in order; arguments as in `stream`."""
        made = dict(self.stream_requests(params, requests, rules, key, samples, detokenize))
        return [made[i] for i in range(len(requests))]

    def stream_requests(
        self,
        params: Params,
        requests: Sequence[Request],
        rules: SamplingParams | None = None,
        key: Array | None = None,
        samples: int = 1,
        detokenize: Detokenize | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yields (index of a request, its completions) once the last of them has finished."""
        made: dict[int, dict[int, Completion]] = {}
        for task, completion, over in self._run(params, requests, rules, key, samples, detokenize):
            if not over:
                continue
            of_request = made.setdefault(task.request, {})
            of_request[task.sample] = completion
            if len(of_request) == samples:
                yield task.request, [of_request[i] for i in range(samples)]
                del made[task.request]

    def stream(
        self,
        params: Params,
        requests: Sequence[Request],
        rules: SamplingParams | None = None,
        key: Array | None = None,
        samples: int = 1,
        detokenize: Detokenize | None = None,
        first_sample: int = 0,
    ) -> Generator[Completion, None, None]:
        """Yields completions as they finish.

        Closing the iterator ends the work; nothing is left on the device but what it is doing.
        With several processes all of them make the same calls and get the same completions.

        Args:
          params: from `prepare`.
          requests: prompts and item ids.
          rules: how to draw and when to stop; None for the sampler's own.
          key: PRNG key; row (item, sample) draws from fold_in(fold_in(key, item), sample). None
            for key 0.
          samples: completions of each request; they share the keys and values of its prompt.
          detokenize: ids to text, where the rules have stop texts.
          first_sample: number of the first of the `samples`.

        Raises:
          ValueError: for what cannot be sampled: an empty prompt, no token at all, no rules, stop
            texts without `detokenize`, a key that is not of JAX's usual kind.
        """
        run = self._run(params, requests, rules, key, samples, detokenize, first_sample)
        return (completion for _, completion, over in run if over)

    def stream_parts(
        self,
        params: Params,
        request: Request,
        rules: SamplingParams | None = None,
        key: Array | None = None,
        detokenize: Detokenize | None = None,
    ) -> Iterator[Completion]:
        """Yields one completion as it grows, `chunk` tokens at a time; the last is the whole."""
        for _, completion, _ in self._run(params, [request], rules, key, 1, detokenize):
            yield completion

    def programs(self) -> list[str]:
        """The decoding programs that this sampler has used, a line each."""
        return sorted(self._used)

    def _run(
        self,
        params: Params,
        requests: Sequence[Request],
        rules: SamplingParams | None,
        key: Array | None,
        samples: int,
        detokenize: Detokenize | None,
        first_sample: int = 0,
    ) -> Iterator[tuple[Task, Completion, bool]]:
        rules = rules or self.rules
        key = jax.random.key(0, impl=device.KEYS) if key is None else key
        if rules is None:
            raise ValueError("there are no rules: give them here, or to the Sampler")
        if rules.stop_texts and detokenize is None:
            raise ValueError("stop texts need `detokenize`, which makes text of ids")
        if str(jax.random.key_impl(key)) != device.KEYS:
            raise ValueError(
                f"a key of kind {jax.random.key_impl(key)} gives other numbers in other batches; "
                f"make it with jax.random.key(seed, impl={device.KEYS!r})"
            )
        if samples < 1 or first_sample < 0:
            raise ValueError(f"samples = {samples}, first_sample = {first_sample}: too few")
        for i, request in enumerate(requests):
            limit = request.max_new_tokens
            if not (*request.prompt, *request.prefill):
                raise ValueError(f"request {i} has an empty prompt")
            if (rules.max_new_tokens if limit is None else limit) < 1:
                raise ValueError(f"request {i} may draw no token: max_new_tokens must be above 0")
            if not 0 <= request.item < 2**32:
                raise ValueError(f"request {i}: item {request.item} is no number of 32 bits")
        if not requests:
            return iter(())
        run = _Run(self, params, requests, rules, key, samples, detokenize, first_sample)
        return run.events()

    @cached_property
    def _programs(self) -> Programs:
        return Programs(self.config, self.compute, self.mesh)

    @cached_property
    def _used(self) -> dict[str, None]:
        return {}

    @property
    def _shards(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def _least_rows(self) -> int:
        """XLA's CPU compiler is very slow at bfloat16 products of fewer rows."""
        cpu = self.mesh.devices.flat[0].platform == "cpu"
        return 8 if cpu and self.compute.dtype == "bfloat16" else 1


class _Run:
    """One call of the sampler: its schedule, and what it makes of the batch on the device."""

    def __init__(
        self,
        sampler: Sampler,
        params: Params,
        requests: Sequence[Request],
        rules: SamplingParams,
        key: Array,
        samples: int,
        detokenize: Detokenize | None,
        first_sample: int,
    ):
        self._sampler, self._params, self._requests = sampler, params, requests
        self._rules, self._on_device = rules, rules.on_device()
        # As numbers, since every process has to be able to hand it in.
        self._key = np.asarray(jax.random.key_data(key))
        self._detokenize, self._first_sample = detokenize, first_sample
        self._prompts = [[*request.prompt, *request.prefill] for request in requests]
        self._limits = [
            rules.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
            for request in requests
        ]
        self._schedule = Schedule(
            [len(prompt) for prompt in self._prompts],
            self._limits,
            samples,
            sampler.rows,
            sampler.chunk,
            sampler._shards,
            sampler._least_rows,
        )
        self._made: dict[Task, Completion] = {}
        self._started: dict[Task, float] = {}
        self._chunks: list[device.Chunk] = []
        self._batch = Batch(
            sampler._programs, self._on_device, sampler.int8_cache, self._schedule.shape
        )

    def events(self) -> Iterator[tuple[Task, Completion, bool]]:
        """(task, what it has come to, whether it is over), whenever a flight has come back."""
        schedule = self._schedule
        while not schedule.done:
            # One flight is looked at while the next is under way.
            while len(schedule.flights) < 2:
                self._give_work()
                self._fly()
            yield from self._land()

    # ---- host to device

    def _give_work(self) -> None:
        admission = self._schedule.admit()
        self._move(self._schedule.widen(admission))
        if admission.start:
            self._enter(admission)
        self._move(self._schedule.move())

    def _enter(self, admission: Admission) -> None:
        sampler, shape = self._sampler, self._schedule.shape
        requests = [request for request, _ in admission.prefill]
        lengths = [len(self._prompts[request]) for request in requests]
        for part, rows, slots in prefill_batches(lengths, sampler.rows, sampler._shards):
            into = np.full(rows, shape.groups, np.int32)
            ids = np.zeros((rows, slots), np.int32)
            real = np.ones(rows, np.int32)
            for row, i in enumerate(part):
                into[row], real[row] = admission.prefill[i][1], lengths[i]
                ids[row, : lengths[i]] = self._prompts[requests[i]]
            self._batch.prefill(self._params, ids, real, into)
        if admission.copy:
            source, into = np.full((2, shape.groups), shape.groups, np.int32)
            for i, (a, b) in enumerate(admission.copy):
                source[i], into[i] = a, b
            self._batch.copy(np.minimum(source, shape.groups - 1), into)
        self._start(admission.start)

    def _start(self, starts: Sequence[tuple[int, int, Task]]) -> None:
        shape = self._schedule.shape
        by_row = (shape.groups, shape.width)
        start, closed = np.zeros((2, *by_row), bool)
        items, samples = np.zeros((2, *by_row), np.uint32)
        limits = np.zeros(by_row, np.int32)
        for group, row, task in starts:
            at, request = (group, row), self._requests[task.request]
            start[at], closed[at] = True, _contains(request.prefill, self._rules.close_ids)
            sample = self._first_sample + task.sample
            items[at], samples[at] = request.item, sample
            limits[at] = self._limits[task.request]
            self._made[task] = Completion(request.item, sample, [], [], [], "length", 0.0)
            self._started[task] = time.monotonic()
        self._batch.start(self._key, start, items, samples, limits, closed)

    def _move(self, move: Move | None) -> None:
        if move is not None:
            self._batch.move(self._schedule.shape, move)
            self._schedule.moved(move)

    def _fly(self) -> None:
        sampler, schedule = self._sampler, self._schedule
        sampler._used[_named(schedule.shape, self._on_device)] = None
        self._chunks.append(self._batch.decode(self._params, sampler.chunk, schedule.floor()))
        schedule.fly()

    # ---- device to host

    def _land(self) -> Iterator[tuple[Task, Completion, bool]]:
        flight = self._schedule.land()
        chunk: device.Chunk = jax.device_get(self._chunks.pop(0))
        counts = (chunk.tokens != device.IDLE).sum(axis=-1)
        now = time.monotonic()
        ended = []
        for at, task in flight.tasks.items():
            count = int(counts[at])
            if not self._schedule.goes_on(task):
                continue
            before = self._made[task]
            completion = dataclasses.replace(
                before,
                ids=before.ids + chunk.tokens[at][:count].tolist(),
                logps=before.logps + chunk.logps[at][:count].tolist(),
                drawn_logps=before.drawn_logps + chunk.drawn_logps[at][:count].tolist(),
                seconds=now - self._started[task],
            )
            over = not bool(chunk.active[at])
            if over and completion.ids[-1] in self._rules.stop_ids:
                completion = dataclasses.replace(completion, stop="id")
            end = self._text_end(completion.ids, len(before.ids))
            if end is not None:
                completion = dataclasses.replace(
                    completion,
                    ids=completion.ids[:end],
                    logps=completion.logps[:end],
                    drawn_logps=completion.drawn_logps[:end],
                    stop="text",
                )
                if not over:
                    ended.append(self._schedule.place(task))
                over = True
            self._schedule.drew(task, count, over)
            if over:
                del self._made[task], self._started[task]
            else:
                self._made[task] = completion
            if count or over:
                yield task, completion, over
        if ended:
            mask = np.zeros(self._schedule.shape[:2], bool)
            mask[tuple(zip(*ended, strict=True))] = True
            self._batch.end(mask)

    def _text_end(self, ids: Sequence[int], known: int) -> int | None:
        """Tokens up to the one that completes a stop text, of which `known` are looked at."""
        texts = self._rules.stop_texts
        if not texts:
            return None
        assert self._detokenize is not None
        # A character takes up to four tokens, and the text before a token may change how it reads.
        window = 4 * max(map(len, texts)) + 8
        for end in range(known + 1, len(ids) + 1):
            said = self._detokenize(ids[max(end - window, 0) : end])
            if any(text in said for text in texts):
                return end
        return None


def _contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    starts = range(len(ids) - len(part) + 1)
    return bool(part) and any(list(ids[i : i + len(part)]) == list(part) for i in starts)


def _named(shape: Shape, rules: SamplingParams) -> str:
    how = "greedy" if rules.temperature == 0.0 else f"temperature {rules.temperature:g}"
    return (
        f"{shape.groups} x {shape.width} rows, {shape.prompt_slots} prompt slots, "
        f"{shape.ring_slots} response slots, {how}"
    )
