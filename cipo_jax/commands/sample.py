"""``sample``: ask a model questions and watch it think."""

import sys
import time
from collections.abc import Iterator
from typing import Any

from cipo_jax.commands.flags import parse_flags
from cipo_jax.config import Config

HELP = """Prints the chain of thought as it is generated, then the answer and the speed: for
--question, for each line of standard input, or for what you type. Drawn by config.sampling
(temperature, top_p, max_new_tokens); config.lora.path adds the adapters of a PEFT folder."""


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    config, flags = parse_flags(
        Config, "sample", argv, HELP, strings={"question": "what to ask; default: standard input"}
    )
    import dataclasses

    from cipo_jax.models.decoder import abstract_params
    from cipo_jax.models.hub import resolve
    from cipo_jax.models.lora import assemble, load_adapters, lora_of
    from cipo_jax.models.reasoning_model import ReasoningModel, compute_of
    from cipo_jax.sampling.sampler import Request, Sampler, rules_of
    from cipo_jax.training.mesh import make_mesh, param_shardings
    from cipo_jax.unlearning.engine import address

    model = ReasoningModel.open(config.model.path, config.think)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    sampler = Sampler(model.config, compute_of(config.model, decoding=True), mesh, rows=1)
    shardings = param_shardings(abstract_params(model.config), mesh)
    lora = lora_of(config.lora) if config.lora.path else None
    params = model.load_params(shardings, config.model.decode_dtype)
    if lora is not None:
        adapters = load_adapters(resolve(config.lora.path), model.config, lora)
        params = assemble(lora, params, adapters)
    params = sampler.prepare(params)
    settings = config.sampling
    rules = rules_of(model.format, settings.max_new_tokens, settings.temperature, settings.top_p)
    key = address(config.seed, "sample")
    for number, question in enumerate(_questions(flags.question)):
        request = Request(model.format.prompt_ids(question), number)
        printer = _Printer(model.format)
        started = time.monotonic()
        first, first_tokens, tokens, stopped = started, 0, 0, False
        for completion in sampler.stream_tokens(params, request, rules, key):
            tokens, stopped = len(completion.ids), completion.stopped
            if not first_tokens:
                first, first_tokens = time.monotonic(), tokens
            printer.show(completion.ids)
        ended = time.monotonic()
        printer.end(stopped)
        # The first token waits for the prompt (and, once, for the compiler).
        speed = (tokens - first_tokens) / (ended - first) if tokens > first_tokens else 0.0
        print(
            f"({tokens} tokens, {speed:.0f} tok/s; first token after {first - started:.1f} s)",
            file=sys.stderr,
        )
    return 0


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
