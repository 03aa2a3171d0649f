"""``sample``: ask a model questions and watch it think, or have it answer a file of them."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cipo_jax.commands.flags import exit_for_help, parse_flags
from cipo_jax.errors import UserError

if TYPE_CHECKING:
    from cipo_jax.experiments.sample import Questioner

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
    "verbose": "1 to print the memory plan and the compiled programs",
}


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    argv = [f"--n={arg[2:]}" if arg[:2] == "-n" and arg[2:].isdigit() else arg for arg in argv]
    exit_for_help("sample", argv, HELP, FLAGS)
    from cipo_jax.config import Config

    config, flags = parse_flags(Config, "sample", argv, HELP, strings=FLAGS)
    if bool(flags.input) != bool(flags.output):
        raise UserError("sample: --input and --output come together")
    if flags.input and flags.question:
        raise UserError("sample: --question is for one question, --input for a file; give one")
    if flags.n and not (flags.n.isdigit() and int(flags.n) > 0):
        raise UserError(f"sample: --n={flags.n}: must be a whole number above 0")
    if flags.n and not flags.input:
        raise UserError("sample: --n goes with --input")
    if flags.input and Path(flags.input).resolve() == Path(flags.output).resolve():
        raise UserError(f"sample: --output={flags.output} is the input; give another file")
    from cipo_jax.data.readers import read_questions
    from cipo_jax.experiments.sample import Questioner, answer_file
    from cipo_jax.progress import Reporter

    questions = read_questions(flags.input) if flags.input else []
    questioner = Questioner.open(config, flags.stop, flags.prefill or "", bool(flags.input))
    if flags.verbose:
        print(f"planned: {questioner.plan}", file=sys.stderr)
    if flags.input:
        answer_file(questioner, questions, Path(flags.output), int(flags.n or 1), Reporter())
    else:
        _talk(questioner, _questions(flags.question))
    if flags.verbose:
        for program in questioner.sampler.programs():
            print(f"program: {program}", file=sys.stderr)
    return 0


def _talk(questioner: "Questioner", questions: Iterator[str]) -> None:
    """Answers questions one by one, and shows each answer as it comes."""
    from cipo_jax.reports.thought_printer import ThoughtPrinter

    prefill = questioner.prefill_ids
    for number, question in enumerate(questions):
        growing = questioner.watch(question, number)
        printer = ThoughtPrinter(questioner.model.chat)
        started = time.monotonic()
        first, first_tokens, tokens, stopped = started, 0, 0, False
        printer.show(prefill)
        for completion in growing:
            tokens, stopped = len(completion.ids), completion.stopped
            if not first_tokens:
                first, first_tokens = time.monotonic(), tokens
            printer.show([*prefill, *completion.ids])
        ended = time.monotonic()
        printer.end(stopped)
        # The first tokens wait for the prompt (and, once, for the compiler).
        speed = (tokens - first_tokens) / (ended - first) if tokens > first_tokens else 0.0
        print(
            f"({tokens} tokens, {speed:.0f} tok/s; first tokens after {first - started:.1f} s)",
            file=sys.stderr,
        )


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
