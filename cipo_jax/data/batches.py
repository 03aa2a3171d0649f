"""Token ids to fixed-shape batches, in an order that is a pure function of (seed, step)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np


class TokenizedExample(NamedTuple):
    """One training row as ids."""

    prompt: Sequence[int]
    completion: Sequence[int]


class CompletionBatch(NamedTuple):
    """Right-padded rows. Padding is known by the lengths alone, never by an id.

    Attributes:
      tokens: [B, T] prompt, completion, padding.
      starts: [B] index of the first completion token, which is the prompt's length.
      completions: [B, C] the completions by themselves.
      lengths: [B] real tokens of each completion.
    """

    tokens: Any
    starts: Any
    completions: Any
    lengths: Any

    @property
    def mask(self) -> Any:
        """[B, C], true where a completion token is real."""
        return np.arange(self.completions.shape[1]) < self.lengths[:, None]


class Shape(NamedTuple):
    """Padded sizes of a batch."""

    total: int
    completion: int


def bucket(length: int, multiple: int = 16) -> int:
    """The padded size for a length: the next multiple."""
    return -(-length // multiple) * multiple


def shape_of(rows: Sequence[TokenizedExample], multiple: int = 16) -> Shape:
    """Padded sizes that hold every row."""
    return Shape(
        bucket(max(len(r.prompt) + len(r.completion) for r in rows), multiple),
        bucket(max(len(r.completion) for r in rows), multiple),
    )


def collate(rows: Sequence[TokenizedExample], shape: Shape, pad_id: int = 0) -> CompletionBatch:
    """Stacks rows into right-padded arrays of the given shape."""
    tokens = np.full((len(rows), shape.total), pad_id, np.int32)
    completions = np.full((len(rows), shape.completion), pad_id, np.int32)
    for i, row in enumerate(rows):
        whole = [*row.prompt, *row.completion]
        tokens[i, : len(whole)] = whole
        completions[i, : len(row.completion)] = row.completion
    return CompletionBatch(
        tokens,
        np.array([len(r.prompt) for r in rows], np.int32),
        completions,
        np.array([len(r.completion) for r in rows], np.int32),
    )


def shuffled_batches(rows: int, batch: int, seed: int) -> Callable[[int], np.ndarray]:
    """Row indices of each step's batch, [batch], by random access.

    Rows are shuffled anew in each pass and passes follow without a seam, so every batch is full
    and no row comes twice before all have come once.
    """
    stream = grain.MapDataset.range(rows).seed(seed).shuffle().repeat().batch(batch)
    return lambda step: np.asarray(stream[step])


def fixed_batches(items: Sequence[Any], size: int) -> Iterator[tuple[list[Any], int]]:
    """Batches of one size, and how many items of each count; the last is filled by repetition."""
    for at in range(0, len(items), size):
        part = list(items[at : at + size])
        yield part + [part[-1]] * (size - len(part)), len(part)
