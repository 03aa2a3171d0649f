"""``sample``: ask a model questions and watch it think, or have it answer a file of them."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cipo_jax.commands.flags import parse_flags
from cipo_jax.config import Config
from cipo_jax.errors import Preempted, UserError
from cipo_jax.evals.attacks import prefill_text

HELP = """Prints the chain of thought as it is generated, then the answer and the speed: for
--question, for each line of standard input, or for what you type. Drawn by config.sampling
(temperature, top_p, max_new_tokens, think_budget, ...); config.lora.path adds the adapters of a
PEFT folder.

With --input=FILE.jsonl, a question in each line ({"question": "..."}), it writes a line for each
completion to --output=FILE.jsonl, many at a time, as they finish. The same command goes on where it
was stopped, and a greater --n adds samples."""

FLAGS = {
    "question": "what to ask; default: standard input",
    "input": "JSON Lines of questions",
    "output": "JSON Lines of completions, with --input",
    "n": "completions of each question, with --input; default 1",
    "prefill": "how the chain of thought is made to begin: a text, zero (ZeroThink) or less "
    "(LessThink)",
    "stop": "a text that ends a completion",
    "verbose": "1 to tell what memory was planned and which programs were compiled",
}
# Decoding attacks of R-TOFU (arXiv 2505.15214); the prompt ends with the opened think block.


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    argv = [f"--n={arg[2:]}" if arg[:2] == "-n" and arg[2:].isdigit() else arg for arg in argv]
    config, flags = parse_flags(Config, "sample", argv, HELP, strings=FLAGS)
    if bool(flags.input) != bool(flags.output):
        raise UserError("sample: --input and --output come together")
    if flags.input and flags.question:
        raise UserError("sample: --question is for one question, --input for a file; give one")
    if flags.n and not (flags.n.isdigit() and int(flags.n) > 0):
        raise UserError(f"sample: --n={flags.n}: must be a whole number above 0")
    if flags.n and not flags.input:
        raise UserError("sample: --n goes with --input")
    if flags.input:
        from cipo_jax.data.readers import read_questions

        if Path(flags.input).resolve() == Path(flags.output).resolve():
            raise UserError(f"sample: --output={flags.output} is the input; give another file")

        return _Asker(config, flags, in_file=True).file(
            read_questions(flags.input), Path(flags.output), int(flags.n or 1)
        )
    _Asker(config, flags, in_file=False).talk(_questions(flags.question))
    return 0


class _Asker:
    """A model that is ready to be asked."""

    def __init__(self, config: Config, flags: Any, in_file: bool):
        from cipo_jax.hub import resolve
        from cipo_jax.models.decoder import abstract_params
        from cipo_jax.models.lora import assemble, load_adapters, lora_of
        from cipo_jax.models.reasoning_model import ReasoningModel, compute_of, fingerprint
        from cipo_jax.sampling.memory import fitting_rows
        from cipo_jax.sampling.sampler import Sampler, rules_of_settings
        from cipo_jax.training.mesh import make_mesh, param_shardings
        from cipo_jax.unlearning.engine import derive_key

        settings = config.sampling
        self._adapters = fingerprint(resolve(config.lora.path)) if config.lora.path else ""
        self._config, self._verbose = config, bool(flags.verbose)
        model = ReasoningModel.open(config.model.path, config.think)
        self._model, self._format = model, model.format
        mesh = make_mesh(**dataclasses.asdict(config.mesh))
        compute = compute_of(config.model, decoding=True)
        planned = fitting_rows(
            f"config.sampling.rows = {settings.rows}",
            settings.rows if in_file else mesh.shape["data"] * mesh.shape["fsdp"],
            model.config,
            compute,
            mesh,
            config.data.max_prompt_tokens,
            settings.max_new_tokens,
            int8_cache=settings.int8_cache,
        )
        chunk = settings.chunk if in_file else min(settings.chunk, 8)
        self._sampler = Sampler(
            model.config, compute, mesh, planned.rows, chunk, settings.int8_cache
        )
        self._tell(f"planned: {planned}")
        shardings = param_shardings(abstract_params(model.config), mesh)
        lora = lora_of(config.lora) if config.lora.path else None
        params = model.load_params(shardings, config.model.decode_dtype)
        if lora is not None:
            adapters = load_adapters(resolve(config.lora.path), model.config, lora)
            params = assemble(lora, params, adapters)
        self._params = self._sampler.prepare(params)
        self._stops = (flags.stop,) if flags.stop else ()
        self._rules = rules_of_settings(model.format, settings, self._stops)
        wished: str = flags.prefill or ""
        text = prefill_text(wished, model.format.close)
        self._prefill_text = text
        self._prefill = model.format.text_ids(text)
        self._key = derive_key(config.seed, "sample")

    def _tell(self, text: str) -> None:
        if self._verbose:
            print(text, file=sys.stderr)

    def _request(self, question: str, item: int) -> Any:
        from cipo_jax.sampling.sampler import Request

        prompt, limit = self._format.prompt_ids(question), self._config.data.max_prompt_tokens
        if len(prompt) > limit:
            raise UserError(
                f"question {item + 1}: its prompt has {len(prompt)} tokens, "
                f"config.data.max_prompt_tokens is {limit}"
            )
        return Request(prompt, item, self._prefill)

    # ---- one by one, on the terminal

    def talk(self, questions: Iterator[str]) -> None:
        """Answers questions one by one, and shows each answer as it comes."""
        for number, question in enumerate(questions):
            printer = _Printer(self._format)
            started = time.monotonic()
            first, first_tokens, tokens, stopped = started, 0, 0, False
            printer.show(self._prefill)
            for completion in self._sampler.stream_parts(
                self._params,
                self._request(question, number),
                self._rules,
                self._key,
                self._format.text_of,
            ):
                tokens, stopped = len(completion.ids), completion.stopped
                if not first_tokens:
                    first, first_tokens = time.monotonic(), tokens
                printer.show([*self._prefill, *completion.ids])
            ended = time.monotonic()
            printer.end(stopped)
            # The first tokens wait for the prompt (and, once, for the compiler).
            speed = (tokens - first_tokens) / (ended - first) if tokens > first_tokens else 0.0
            print(
                f"({tokens} tokens, {speed:.0f} tok/s; first tokens after {first - started:.1f} s)",
                file=sys.stderr,
            )
        self._tell_programs()

    def _tell_programs(self) -> None:
        for program in self._sampler.programs():
            self._tell(f"program: {program}")

    # ---- many at a time, to a file

    def file(self, questions: list[str], path: Path, samples: int) -> int:
        """Answers questions to a file, and goes on with one that is there."""
        from cipo_jax.progress import Reporter

        made_by = self._made_by()
        done = _read_done(path, questions, made_by)
        missing = [
            (item, sample)
            for item in range(len(questions))
            for sample in range(samples)
            if (item, sample) not in done
        ]
        first = min((sample for _, sample in missing), default=0)
        items = dict.fromkeys(item for item, _ in missing)
        requests = [self._request(questions[item], item) for item in items]
        reporter = Reporter()
        started, tokens = time.monotonic(), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                path.open("a", encoding="utf-8") as file,
                reporter.bar("sampling", len(questions) * samples) as bar,
                contextlib.closing(
                    self._sampler.stream(
                        self._params,
                        requests,
                        self._rules,
                        self._key,
                        samples - first,
                        self._format.text_of,
                        first,
                    )
                ) as completions,
            ):
                bar.skip(sum(sample < samples for _, sample in done))
                for completion in completions:
                    tokens += len(completion.ids)
                    if (completion.item, completion.sample) in done:
                        continue
                    row = self._row(questions[completion.item], completion, made_by)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    bar.advance(1, len(completion.ids))
        except KeyboardInterrupt:
            raise Preempted(f"stopped; {path} is kept, the same command goes on with it") from None
        seconds = time.monotonic() - started
        reporter.line(
            f"{len(questions) * samples} completions in {path}; {tokens} tokens in "
            f"{seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tok/s, "
            f"{len(self._sampler.programs())} decoding programs"
        )
        self._tell_programs()
        return 0

    def _made_by(self) -> str:
        """Changes with everything that decides what is drawn."""
        config = dataclasses.asdict(self._config)
        sampling = config["sampling"]
        for key in ("rows", "chunk"):
            del sampling[key]
        model = {k: v for k, v in config["model"].items() if k in ("path", "decode_dtype")}
        made_by = [
            self._model.fingerprint(),
            model,
            config["seed"],
            config["think"],
            self._adapters,
            sampling,
            self._prefill_text,
            self._stops,
        ]
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]

    def _row(self, question: str, completion: Any, made_by: str) -> dict[str, Any]:
        thought = self._format.split([*self._prefill, *completion.ids])
        return {
            "item": completion.item,
            "sample": completion.sample,
            "question": question,
            **thought._asdict(),
            "stop": completion.stop,
            "tokens": len(completion.ids),
            "logp": sum(completion.logps),
            "drawn_logp": sum(completion.drawn_logps),
            "tokens_per_second": round(completion.tokens_per_second, 1),
            "made_by": made_by,
        }


_BEGINS = b'{"item": '  # each line of an output


def _read_done(path: Path, questions: list[str], made_by: str) -> set[tuple[int, int]]:
    """(item, sample) of the completions that a file has; a torn last line is cut off."""
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
            try:
                row = json.loads(line)
                item, sample, question = row["item"], row["sample"], row["question"]
                known = questions[item] if 0 <= item < len(questions) else None
                same = row["made_by"] == made_by
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}:{number}: is no completion of this command; choose another --output"
                ) from None
            if not same:
                raise UserError(
                    f"{path}:{number}: was made with another model or other settings; choose "
                    "another --output"
                )
            if question != known:
                raise UserError(
                    f"{path}:{number}: field 'question' is not question {item + 1} of --input; "
                    "choose another --output"
                )
            done.add((item, sample))
            whole += len(line)
    with path.open("rb+") as file:
        file.truncate(whole)
    return done


class _Printer:
    """Prints a generation as it grows: what is new in the thought, then what is in the answer."""

    def __init__(self, format: Any):
        self._format = format
        self._shown = {"cot": "", "answer": ""}
        self._closed = False
        print("[thinks] ", end="", flush=True)

    def show(self, ids: list[int], whole: bool = False) -> None:
        thought = self._format.split(ids)
        self._ids = ids
        if self._closed and not thought.closed:  # A second block was opened; shown when closed.
            return
        self._print("cot", thought.cot, whole or thought.closed)
        if thought.closed:
            if not self._closed:
                print("\n[answers] ", end="")
            self._closed = True
            self._print("answer", thought.answer, whole)

    def end(self, stopped: bool) -> None:
        self.show(self._ids, whole=True)
        print("" if stopped else " [cut off at config.sampling.max_new_tokens]")
        if not self._closed:
            print("[the think block was not closed: there is no answer]")

    def _print(self, part: str, text: str, whole: bool) -> None:
        if not whole:
            # Half a letter, or what may turn out to be the beginning of the closing tag.
            text = text.rstrip("\ufffd")
            tag = self._format.close
            held = [n for n in range(1, len(tag)) if text.endswith(tag[:n])]
            text = text[: len(text) - max(held, default=0)]
        shown = self._shown[part]
        if text.startswith(shown):
            print(_harmless(text[len(shown) :]), end="", flush=True)
            self._shown[part] = text


def _harmless(text: str) -> str:
    """Text of a model without the control characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _questions(question: str) -> Iterator[str]:
    if question:
        yield question
        return
    asks = sys.stdin.isatty()
    if asks:
        print("ask a question a line; an empty line or Ctrl-D ends", file=sys.stderr)
    while True:
        if asks:
            print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()
