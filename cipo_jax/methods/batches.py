"""Batches of what is retained, which all methods add to their own."""

from collections.abc import Callable

from cipo_jax.data.batches import CompletionBatch, PadShape, collate, shuffled_batches
from cipo_jax.runs.data import RetainedExamples
from cipo_jax.runs.identity import derive_seed
from cipo_jax.shared_config import TrainConfig


def retained_batches(
    retained: RetainedExamples, settings: TrainConfig, seed: int, phase: int
) -> Callable[[int], dict[str, CompletionBatch]]:
    """Batches of facts and of reasoning by step, whichever there are.

    Args:
      retained: the examples.
      settings: batch sizes.
      seed: of the run.
      phase: number of the phase, which decides the order.
    """
    sizes = (settings.retain_batch_size, settings.reasoning_batch_size)
    streams = {}
    for number, (name, size) in enumerate(zip(RetainedExamples.GROUPS, sizes, strict=True)):
        examples = getattr(retained, name)
        if examples:
            order = shuffled_batches(len(examples), size, derive_seed(seed, phase, 1 + number))
            streams[name] = (examples, PadShape.fitting(examples), order)

    def at(step: int) -> dict[str, CompletionBatch]:
        return {
            name: collate([examples[i] for i in order(step)], shape)
            for name, (examples, shape, order) in streams.items()
        }

    return at


def nothing_retained(step: int) -> dict[str, CompletionBatch]:
    """In place of `retained_batches` where nothing is retained."""
    del step
    return {}
