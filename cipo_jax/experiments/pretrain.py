"""Trains the tiny reasoning models from nothing, with the same update step as everything else."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from cipo_jax import losses
from cipo_jax.config import PretrainConfig
from cipo_jax.data import tiny_world
from cipo_jax.data.batches import PadShape, TokenizedExample, collate, shuffled_batches
from cipo_jax.data.tiny_tokenizer import train_tokenizer
from cipo_jax.models.decoder import Compute, DecoderConfig, init_params
from cipo_jax.models.safetensors_save import save_folder
from cipo_jax.progress import Reporter
from cipo_jax.text.chat_format import ChatFormat
from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.loop import Callbacks, Phase, train_phase
from cipo_jax.training.mesh import make_mesh
from cipo_jax.training.objective import Batch, Metrics, Objective, StepContext
from cipo_jax.training.optimizer import AdamW, Schedule
from cipo_jax.training.policy import Policy
from cipo_jax.training.step import PhaseResult, TrainStep
from cipo_jax.typing import Array, Params

_TOKENIZER_TEXTS = 8000
_STREAM = 60000  # texts that a model is trained on, over and over
_SUM_WEIGHT = 0.3
_STORED_AS = "bfloat16"


def make_models(config: PretrainConfig, out: Path, reporter: Reporter) -> list[str]:
    """Writes world.json, target/ and retrained/ under `out`.

    Returns:
      The names of the people whom the retrained model never saw.
    """
    out.mkdir(parents=True, exist_ok=True)
    world = tiny_world.make_world(config.seed, config.people, config.strangers)
    forgotten = world.choose((), config.forget.count, config.forget.seed)
    known = tuple(p for p in world.people if p not in forgotten)
    # The tokenizer is made without the people to be forgotten, so that both models may use it.
    texts = (
        text
        for i in range(_TOKENIZER_TEXTS)
        for example in [tiny_world.training_example(world, known, config.seed, i)]
        for text in (example.question, example.cot or "", example.answer)
    )
    tokenizer = train_tokenizer(texts, config.vocab_size)
    shape = DecoderConfig(
        vocab_size=len(tokenizer),
        d_model=config.d_model,
        d_ff=config.d_ff,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.d_model // config.heads,
        tied_head=True,
    )
    step = TrainStep(
        Policy(shape, Compute(remat="names", logits_chunk=4096)),
        PretrainObjective(),
        AdamW.from_config(config.train),
        make_mesh(**dataclasses.asdict(config.mesh)),
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
    )
    schedule = Schedule.from_config(config.train, config.steps)
    checkpoints = Checkpoints(out / ".checkpoints")
    for name, people in (("target", world.people), ("retrained", known)):
        batch_at, tokens = _batches(config, world, people, ChatFormat(tokenizer))
        phase = Phase(name, step, schedule, config.steps, config.train.checkpoint_every)
        with reporter.bar(name, config.steps) as bar:
            bar.skip(checkpoints.latest_step(name) or 0)

            def on_step(number: int, metrics: dict[str, float], bar=bar, tokens=tokens) -> None:
                del number
                bar.advance(1, tokens, f"loss {metrics['loss']:.4f}")

            trained = train_phase(
                phase,
                lambda: PhaseResult(init_params(shape, jax.random.key(config.seed))),
                batch_at,
                checkpoints,
                Callbacks(on_step),
            )
        assert trained is not None
        save_folder(out / name, shape, trained.params, tokenizer, dtype=_STORED_AS)
    world.save(out / "world.json")
    shutil.rmtree(checkpoints.root)
    return [p.name for p in forgotten]


@dataclasses.dataclass(frozen=True)
class PretrainObjective(Objective):
    """NLL of completions; sums, which are longer, have their own shape and a fixed weight."""

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        del context
        terms = {
            name: losses.nll(
                policy.completion_logps(params, rows),
                rows.mask,
                "token",
                num_tokens=rows.num_tokens,
            )[0]
            for name, rows in batch.items()
        }
        loss = _SUM_WEIGHT * terms["sums"] + (1 - _SUM_WEIGHT) * terms["language"]
        return loss, {f"nll/{name}": value for name, value in terms.items()}


def _batches(
    config: PretrainConfig,
    world: tiny_world.World,
    people: Sequence[tiny_world.Person],
    format: ChatFormat,
) -> tuple[Callable[[int], Batch], int]:
    """Batches by step, and roughly how many completion tokens one holds."""
    groups: dict[str, list[TokenizedExample]] = {"sums": [], "language": []}
    for i in range(_STREAM):
        e = tiny_world.training_example(world, people, config.seed, i)
        row = TokenizedExample(
            format.prompt_ids(e.question), format.completion_ids(e.cot or "", e.answer)
        )
        groups["sums" if e.kind == "arithmetic" else "language"].append(row)
    sizes = {"sums": config.sum_rows, "language": config.language_rows}
    shapes = {name: PadShape.fitting(rows) for name, rows in groups.items()}
    orders = {
        name: shuffled_batches(len(rows), sizes[name], config.seed + number)
        for number, (name, rows) in enumerate(groups.items())
    }

    def at(step: int) -> Batch:
        return {
            name: collate([rows[i] for i in orders[name](step)], shapes[name])
            for name, rows in groups.items()
        }

    means = {n: np.mean([len(r.completion) for r in rows]) for n, rows in groups.items()}
    return at, int(sum(sizes[n] * means[n] for n in groups))
