"""``sample``: ask a model questions and see its chain of thought."""

import sys
import time
from collections.abc import Iterator

from cipo_jax.commands.flags import parse_flags
from cipo_jax.config import Config

HELP = """Prints the chain of thought, the answer and the speed for --question, or for each line of
standard input. Drawn by config.sampling (temperature, top_p, max_new_tokens)."""


def run(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    config, flags = parse_flags(
        Config, "sample", argv, HELP, strings={"question": "what to ask; default: standard input"}
    )
    import dataclasses

    from cipo_jax.data.batches import bucket
    from cipo_jax.models.decoder import abstract_params
    from cipo_jax.models.reasoning_model import ReasoningModel, compute_of
    from cipo_jax.sampling.decode import Rules
    from cipo_jax.sampling.sampler import Request, Sampler
    from cipo_jax.training.mesh import make_mesh, param_shardings
    from cipo_jax.unlearning.engine import address

    model = ReasoningModel.open(config.model.path)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    sampler = Sampler(model.config, compute_of(config.model, decoding=True), mesh, rows=1)
    shardings = param_shardings(abstract_params(model.config), mesh)
    params = sampler.prepare(model.load_params(shardings))
    settings = config.sampling
    rules = Rules(
        settings.max_new_tokens, (model.format.eos_id,), settings.temperature, settings.top_p
    )
    for number, question in enumerate(_questions(flags.question)):
        started = time.monotonic()
        request = Request(model.format.prompt_ids(question), number)
        (batch, _), *_ = sampler.batches([request])
        slots = bucket(len(request.prompt))
        key = address(config.seed, "sample")
        completion = sampler.run(params, batch, rules, key, 1, slots)[0][0]
        seconds = time.monotonic() - started
        thought = model.format.split(completion.ids)
        print(f"<think> {thought.cot}")
        print(f"</think> {thought.answer}" if thought.closed else "(the think block is not closed)")
        print(f"({len(completion.ids) / seconds:.0f} tok/s)", file=sys.stderr)
    return 0


def _questions(question: str) -> Iterator[str]:
    if question:
        yield question
        return
    if sys.stdin.isatty():
        print("a question a line; an empty line or Ctrl-D ends", file=sys.stderr)
    for line in sys.stdin:
        if not line.strip():
            return
        yield line.strip()
