"""Input and output of the sampler: requests, jobs and completions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax

from cipo_jax.sampling.params import SamplingParams
from cipo_jax.sampling.state import KEY_IMPL
from cipo_jax.typing import Array

StopReason = Literal["id", "text", "length"]
Detokenize = Callable[[Sequence[int]], str]


class Request(NamedTuple):
    """A prompt to complete.

    Attributes:
      prompt: its token ids.
      item: the number that addresses its randomness; 32 bits, unsigned.
      prefill: ids that every completion begins with; they are not part of the result.
      max_new_tokens: replaces that of the sampling parameters; None keeps it.
    """

    prompt: Sequence[int]
    item: int
    prefill: Sequence[int] = ()
    max_new_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
      item: of its request.
      sample: its number among the samples of its request.
      ids: token ids, the stop id included.
      logps: log-probabilities of the tokens under the model at temperature 1, in nats.
      drawn_logps: log-probabilities under the distribution that the tokens were drawn from; 0 for
        greedy and forced tokens.
      stop: why it ended.
      seconds: wall time from its start to its end, measured on the host; not compared.
    """

    item: int
    sample: int
    ids: list[int]
    logps: list[float]
    drawn_logps: list[float]
    stop: StopReason
    seconds: float = dataclasses.field(compare=False)

    @property
    def stopped(self) -> bool:
        """Whether a stop id or stop text ended it, not the limit of tokens."""
        return self.stop != "length"

    @property
    def tokens_per_second(self) -> float:
        return len(self.ids) / self.seconds if self.seconds else 0.0

    def extended(
        self, ids: list[int], logps: list[float], drawn_logps: list[float], seconds: float
    ) -> "Completion":
        """The completion with more tokens."""
        return dataclasses.replace(
            self,
            ids=self.ids + ids,
            logps=self.logps + logps,
            drawn_logps=self.drawn_logps + drawn_logps,
            seconds=seconds,
        )

    def cut(self, length: int, stop: StopReason) -> "Completion":
        """The completion cut after `length` tokens."""
        return dataclasses.replace(
            self,
            ids=self.ids[:length],
            logps=self.logps[:length],
            drawn_logps=self.drawn_logps[:length],
            stop=stop,
        )


@dataclasses.dataclass(frozen=True)
class SamplingJob:
    """One call of the sampler: what to sample, apart from the model's parameters.

    Attributes:
      requests: prompts and item numbers.
      sampling_params: how to draw and when to stop; None for those of the sampler.
      key: PRNG key; sample s of item i draws with fold_in(fold_in(key, i), s). None for key 0.
      num_samples: completions of each request; they share the keys and values of its prompt.
      first_sample: number of the first sample.
      detokenize: ids to text; needed for stop texts.
    """

    requests: Sequence[Request]
    sampling_params: SamplingParams | None = None
    key: Array | None = None
    num_samples: int = 1
    first_sample: int = 0
    detokenize: Detokenize | None = None

    def resolve(self, default: SamplingParams | None) -> "ResolvedJob":
        """Fills in defaults and checks the values.

        Args:
          default: the sampling parameters of a job that has none.

        Raises:
          ValueError: an empty prompt, a limit of 0 tokens, no sampling parameters, stop texts
            without `detokenize`, a key of another implementation than threefry, or an item,
            `num_samples` or `first_sample` out of range.
        """
        sampling_params = self.sampling_params or default
        key = jax.random.key(0, impl=KEY_IMPL) if self.key is None else self.key
        if sampling_params is None:
            raise ValueError("no sampling_params: set them in the job or in the Sampler")
        if sampling_params.stop_texts and self.detokenize is None:
            raise ValueError("stop_texts need `detokenize`, which turns ids into text")
        if str(jax.random.key_impl(key)) != KEY_IMPL:
            raise ValueError(
                f"a key of kind {jax.random.key_impl(key)} gives other numbers in other batches; "
                f"make it with jax.random.key(seed, impl={KEY_IMPL!r})"
            )
        if self.num_samples < 1 or self.first_sample < 0:
            raise ValueError(
                f"num_samples = {self.num_samples}, first_sample = {self.first_sample}: too small"
            )
        prompts, limits = [], []
        for i, request in enumerate(self.requests):
            limit = request.max_new_tokens
            prompts.append([*request.prompt, *request.prefill])
            limits.append(sampling_params.max_new_tokens if limit is None else limit)
            if not prompts[-1]:
                raise ValueError(f"request {i} has an empty prompt")
            if limits[-1] < 1:
                raise ValueError(f"request {i} may draw no token: max_new_tokens must be above 0")
            if not 0 <= request.item < 2**32:
                raise ValueError(f"request {i}: item {request.item} is no number of 32 bits")
        return ResolvedJob(
            tuple(self.requests),
            sampling_params,
            key,
            self.num_samples,
            self.first_sample,
            self.detokenize,
            prompts,
            limits,
        )


class ResolvedJob(NamedTuple):
    """A checked `SamplingJob` with its defaults filled in.

    Attributes:
      requests: as in `SamplingJob`, like all up to `detokenize`.
      sampling_params: how to draw and when to stop.
      key: PRNG key.
      num_samples: completions of each request.
      first_sample: number of the first sample.
      detokenize: ids to text; None without stop texts.
      prompts: for each request its prompt followed by its prefill.
      limits: for each request its greatest number of new tokens.
    """

    requests: tuple[Request, ...]
    sampling_params: SamplingParams
    key: Array
    num_samples: int
    first_sample: int
    detokenize: Detokenize | None
    prompts: list[list[int]]
    limits: list[int]
