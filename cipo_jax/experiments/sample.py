"""Asks a model questions: one as it thinks, or a file of them, resumable."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from cipo_jax.config import Config
from cipo_jax.data.records import Record, field
from cipo_jax.errors import Preempted, UserError
from cipo_jax.evals.attacks import prefill_text
from cipo_jax.hub import resolve
from cipo_jax.language_model import LanguageModel
from cipo_jax.models.lora import Lora
from cipo_jax.models.pretrained import fingerprint
from cipo_jax.progress import Reporter
from cipo_jax.runs.identity import derive_key
from cipo_jax.sampling.job import Completion, Request, SamplingJob, StopReason
from cipo_jax.sampling.memory import MemoryPlan
from cipo_jax.sampling.params import SamplingParams
from cipo_jax.sampling.sampler import Sampler
from cipo_jax.training.mesh import make_mesh
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class SampledCompletion(Record):
    """A line of the output of ``sample --input``."""

    schema: ClassVar[str] = "sampled_completion"
    stored_in: ClassVar[tuple[str, ...]] = ("--output of `sample`",)

    item: int = field("index of the question")
    sample: int = field("number among the samples of the question")
    question: str = field("the question")
    cot: str = field("chain of thought; all the text where the think block was not closed")
    answer: str = field("text after the think block")
    closed: bool = field("whether the think block was closed")
    stop: StopReason = field('why it ended: a stop "id", a stop "text", or the greatest "length"')
    tokens: int = field("generated tokens, without the prefill")
    logp: float = field("log-probability at temperature 1, in nats")
    drawn_logp: float = field("log-probability under the distribution it was drawn from, in nats")
    tokens_per_second: float = field("speed of this completion")
    made_by: str = field("digest of model and settings")


@dataclasses.dataclass(frozen=True)
class Questioner:
    """A model that is ready to be asked.

    Attributes:
      model: the model.
      params: decoding layout.
      sampler: for it.
      plan: of the sampler's memory.
      sampling_params: how to draw and when to stop.
      prefill: how completions begin, as text.
      key: of the random numbers.
      max_prompt_tokens: longest prompt.
      made_by: digest of everything that decides what is drawn.
    """

    model: LanguageModel
    params: Params
    sampler: Sampler
    plan: MemoryPlan
    sampling_params: SamplingParams
    prefill: str
    key: Array
    max_prompt_tokens: int
    made_by: str

    @classmethod
    def open(cls, config: Config, stop: str, prefill: str, many: bool) -> "Questioner":
        """Loads the model of a config, with the adapters of config.lora.path.

        Args:
          config: every setting.
          stop: a text that ends a completion; "" for none.
          prefill: "zero", "less" or a text; see `evals.attacks`.
          many: whether many questions are decoded at a time.
        """
        settings = config.sampling
        mesh = make_mesh(**dataclasses.asdict(config.mesh))
        lora = Lora.from_config(config.lora) if config.lora.path else None
        model_config = dataclasses.replace(config.model, dtype=config.model.decode_dtype)
        model = LanguageModel.from_config(model_config, config.think, mesh, lora, config.lora.path)
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        plan = model.plan_sampler(
            settings.max_batch_size if many else rows,
            config.data.max_prompt_tokens,
            settings.max_new_tokens,
            int8_cache=settings.int8_cache,
            setting="config.sampling.max_batch_size",
        )
        chunk = settings.decode_chunk if many else min(settings.decode_chunk, 8)
        sampler = Sampler(
            model.config, model.decode_compute, mesh, plan.batch_size, chunk, settings.int8_cache
        )
        # Without adapters nothing is trained: the weights are read in the decoding dtype.
        params = model.params if lora else model.load_params(config.model.decode_dtype)
        stops = (stop,) if stop else ()
        text = prefill_text(prefill, model.chat.close)
        return cls(
            model,
            sampler.prepare(params),
            sampler,
            plan,
            SamplingParams.from_config(settings, model.chat, stops),
            text,
            derive_key(config.seed, "sample"),
            config.data.max_prompt_tokens,
            _made_by(config, model, text, stops),
        )

    @property
    def prefill_ids(self) -> list[int]:
        """The prefill as token ids."""
        return self.model.chat.text_ids(self.prefill)

    def request(self, question: str, item: int) -> Request:
        """The request of a question; raises UserError where it is too long."""
        request = self.model.request(question, item, self.prefill)
        if len(request.prompt) > self.max_prompt_tokens:
            raise UserError(
                f"question {item + 1}: its prompt has {len(request.prompt)} tokens, "
                f"config.data.max_prompt_tokens is {self.max_prompt_tokens}"
            )
        return request

    def _job(self, requests: list[Request], samples: int = 1, first: int = 0) -> SamplingJob:
        text_of = self.model.chat.text_of
        return SamplingJob(requests, self.sampling_params, self.key, samples, first, text_of)

    def watch(self, question: str, item: int) -> Iterator[Completion]:
        """One completion as it grows."""
        return self.sampler.stream_parts(self.params, self._job([self.request(question, item)]))

    def answer_file(
        self, questions: list[str], path: Path, samples: int, reporter: Reporter
    ) -> int:
        """Writes a line for each completion, and goes on with a file that is there.

        Returns:
          The number of tokens that were generated.

        Raises:
          UserError: where the file holds something else.
          Preempted: at SIGINT; what was written is kept.
        """
        done = read_done(path, questions, self.made_by)
        missing = [
            (item, sample)
            for item in range(len(questions))
            for sample in range(samples)
            if (item, sample) not in done
        ]
        first = min((sample for _, sample in missing), default=0)
        items = dict.fromkeys(item for item, _ in missing)
        requests = [self.request(questions[item], item) for item in items]
        job, tokens = self._job(requests, max(samples - first, 1), first), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                path.open("a", encoding="utf-8") as file,
                reporter.bar("sampling", len(questions) * samples) as bar,
                contextlib.closing(self.sampler.stream(self.params, job)) as completions,
            ):
                bar.skip(sum(sample < samples for _, sample in done))
                for completion in completions:
                    tokens += len(completion.ids)
                    if (completion.item, completion.sample) in done:
                        continue
                    row = self._record(questions[completion.item], completion).to_row()
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    bar.advance(1, len(completion.ids))
        except KeyboardInterrupt:
            raise Preempted(f"stopped; {path} is kept, the same command goes on with it") from None
        return tokens

    def _record(self, question: str, completion: Completion) -> SampledCompletion:
        thought = self.model.chat.split([*self.prefill_ids, *completion.ids])
        return SampledCompletion(
            item=completion.item,
            sample=completion.sample,
            question=question,
            cot=thought.cot,
            answer=thought.answer,
            closed=thought.closed,
            stop=completion.stop,
            tokens=len(completion.ids),
            logp=sum(completion.logps),
            drawn_logp=sum(completion.drawn_logps),
            tokens_per_second=round(completion.tokens_per_second, 1),
            made_by=self.made_by,
        )


def answer_file(
    questioner: Questioner, questions: list[str], path: Path, samples: int, reporter: Reporter
) -> None:
    """`Questioner.answer_file`, and a line with its speed."""
    started = time.monotonic()
    tokens = questioner.answer_file(questions, path, samples, reporter)
    seconds = time.monotonic() - started
    reporter.line(
        f"{len(questions) * samples} completions in {path}; {tokens} tokens in "
        f"{seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tok/s, "
        f"{len(questioner.sampler.programs())} decoding programs"
    )


def _made_by(config: Config, model: LanguageModel, prefill: str, stops: tuple[str, ...]) -> str:
    """Changes with everything that decides what is drawn."""
    sampling = dataclasses.asdict(config.sampling)
    for key in ("max_batch_size", "decode_chunk"):
        del sampling[key]
    made_by = [
        model.pretrained.fingerprint(),
        {"path": config.model.path, "decode_dtype": config.model.decode_dtype},
        config.seed,
        dataclasses.asdict(config.think),
        fingerprint(resolve(config.lora.path)) if config.lora.path else "",
        sampling,
        prefill,
        stops,
    ]
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


_BEGINS = b'{"schema": "sampled_completion/1", "item": '  # each line of an output


def read_done(path: Path, questions: list[str], made_by: str) -> set[tuple[int, int]]:
    """(item, sample) of the completions that a file has; a torn last line is cut off.

    Raises:
      UserError: naming the line, where the file holds something else.
    """
    done: set[tuple[int, int]] = set()
    if not path.exists():
        return done
    if path.is_dir():
        raise UserError(f"--output={path}: is a folder; give a file")
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and (line[: len(_BEGINS)] == _BEGINS[: len(line)]):
                break  # The process that wrote it was stopped.
            done.add(_done(line, f"{path}:{number}", questions, made_by))
            whole += len(line)
    with path.open("rb+") as file:
        file.truncate(whole)
    return done


def _done(line: bytes, where: str, questions: list[str], made_by: str) -> tuple[int, int]:
    try:
        row = SampledCompletion.from_row(json.loads(line), where)
    except (ValueError, UserError):
        raise UserError(
            f"{where}: is no completion of this command; choose another --output"
        ) from None
    if row.made_by != made_by:
        raise UserError(
            f"{where}: was made with another model or other settings; choose another --output"
        )
    known = questions[row.item] if 0 <= row.item < len(questions) else None
    if row.question != known:
        raise UserError(
            f"{where}: field 'question' is not question {row.item + 1} of --input; "
            "choose another --output"
        )
    return row.item, row.sample
