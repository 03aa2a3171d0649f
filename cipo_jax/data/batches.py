"""Token ids to fixed-shape batches, in an order that is a pure function of (seed, step)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np

T = TypeVar("T")


class TokenizedExample(NamedTuple):
    """One training row as ids."""

    prompt: Sequence[int]
    completion: Sequence[int]


class CompletionBatch(NamedTuple):
    """Right-padded rows. Lengths alone mark padding, never an id.

    Pairs of completions have a second axis: every array is [B, 2, ...].

    Attributes:
      tokens: [B, T] prompt, completion, padding.
      prompt_lengths: [B] length of the prompt, the index of the first completion token.
      completions: [B, C] the completions by themselves.
      lengths: [B] real tokens of each completion.
      num_tokens: [] or, of pairs, [2]; the divisor of means over completion tokens. Set where a
        batch is cut into micro-batches, to the real tokens of the whole batch divided by the number
        of micro-batches: the mean over micro-batches then equals that of the whole batch. None for
        the real tokens of this batch.
      num_sequences: the same for means over sequences, of the rows with at least one real token.
    """

    tokens: Any
    prompt_lengths: Any
    completions: Any
    lengths: Any
    num_tokens: Any = None
    num_sequences: Any = None

    @property
    def mask(self) -> Any:
        """[B, C], true where a completion token is real."""
        return np.arange(self.completions.shape[-1]) < self.lengths[..., None]

    def side(self, index: int) -> "CompletionBatch":
        """One side of pairs: [B, 2, ...] -> [B, ...]."""
        rows = (x[:, index] for x in self[:4])
        return CompletionBatch(*rows, *(n if n is None else n[index] for n in self[4:]))

    def flattened(self) -> "CompletionBatch":
        """Pairs as rows, the sides of each pair next to each other: [B, 2, ...] -> [2 B, ...]."""
        rows = (x.reshape(-1, *x.shape[2:]) for x in self[:4])
        return CompletionBatch(*rows, *(n if n is None else n.sum() for n in self[4:]))


class PadShape(NamedTuple):
    """Padded sizes of a batch, in tokens."""

    total: int
    completion: int

    @classmethod
    def fitting(cls, rows: Sequence[TokenizedExample], multiple: int = 16) -> "PadShape":
        """The smallest sizes that hold every row and are multiples of `multiple`."""
        return cls(
            bucket(max(len(r.prompt) + len(r.completion) for r in rows), multiple),
            bucket(max(len(r.completion) for r in rows), multiple),
        )


def bucket(length: int, multiple: int = 16) -> int:
    """The padded size for a length: the next multiple."""
    return -(-length // multiple) * multiple


def collate(rows: Sequence[TokenizedExample], shape: PadShape, pad_id: int = 0) -> CompletionBatch:
    """Stacks rows into right-padded arrays of the given shape.

    Raises:
      ValueError: for a row that is longer than the shape.
    """
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


def collate_pairs(
    chosen: Sequence[TokenizedExample],
    rejected: Sequence[TokenizedExample],
    shape: PadShape,
    pad_id: int = 0,
) -> CompletionBatch:
    """Stacks pairs of completions, chosen first: every array is [B, 2, ...]."""
    first, second = (collate(side, shape, pad_id) for side in (chosen, rejected))
    rows = zip(first[:4], second[:4], strict=True)
    return CompletionBatch(*(np.stack([a, b], axis=1) for a, b in rows))


def shuffled_batches(rows: int, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Row indices of each step's batch, [batch_size], by random access.

    Each pass shuffles the rows anew and passes follow each other without a gap, so every batch is
    full and no row repeats before all rows have been used.
    """
    stream = grain.MapDataset.range(rows).seed(seed).shuffle().repeat().batch(batch_size)
    return lambda step: np.asarray(stream[step])


def fixed_batches(items: Sequence[T], size: int) -> Iterator[tuple[list[T], int]]:
    """Batches of one size, each with its number of items; repeats of the last item fill it up."""
    for at in range(0, len(items), size):
        part = list(items[at : at + size])
        yield part + [part[-1]] * (size - len(part)), len(part)
