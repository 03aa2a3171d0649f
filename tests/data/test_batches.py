import jax
import numpy as np
import pytest
from trees import assert_trees_equal

from cipo_jax.data.batches import (
    CompletionBatch,
    PadShape,
    TokenizedExample,
    bucket,
    collate,
    collate_pairs,
    fixed_batches,
    shuffled_batches,
)

ROWS = [TokenizedExample([5, 6, 7], [8, 9]), TokenizedExample([5], [1, 2, 3, 4])]


def test_bucket_is_the_next_multiple():
    assert [bucket(n) for n in (1, 15, 16, 17, 32)] == [16, 16, 16, 32, 32]
    assert bucket(5, 4) == 8


def test_shape_holds_every_row():
    assert PadShape.fitting(ROWS) == PadShape(16, 16)
    assert PadShape.fitting(ROWS, 1) == PadShape(5, 4)
    assert PadShape.fitting(ROWS, 4) == PadShape(8, 4)
    long = [TokenizedExample([1] * 20, [2]), TokenizedExample([1], [2] * 17)]
    assert PadShape.fitting(long) == PadShape(32, 32)


def test_collate_lays_out_prompt_completion_padding():
    batch = collate(ROWS, PadShape(6, 5))
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0], [5, 1, 2, 3, 4, 0]]
    assert batch.completions.tolist() == [[8, 9, 0, 0, 0], [1, 2, 3, 4, 0]]
    assert batch.prompt_lengths.tolist() == [3, 1]
    assert batch.lengths.tolist() == [2, 4]
    assert {array.dtype for array in jax.tree.leaves(batch)} == {np.dtype(np.int32)}


def test_collate_pads_with_the_id_that_it_is_given():
    batch = collate(ROWS, PadShape(6, 5), pad_id=63)
    assert batch.tokens[:, -1].tolist() == [63, 63]
    assert batch.completions[0].tolist() == [8, 9, 63, 63, 63]


def test_mask_goes_by_lengths_where_real_tokens_equal_the_pad_id():
    row = TokenizedExample([0, 5, 0], [0, 7, 0, 0])
    batch = collate([row, ROWS[0]], PadShape(8, 5), pad_id=0)
    assert batch.mask.tolist() == [[True] * 4 + [False], [True] * 2 + [False] * 3]


def test_pairs_lie_side_by_side_and_as_rows_one_after_the_other():
    other = [TokenizedExample([5, 6, 7], [1]), TokenizedExample([5], [2, 3])]
    shape = PadShape(6, 4)
    pairs = collate_pairs(ROWS, other, shape)
    assert pairs.tokens.shape == (2, 2, 6)
    assert pairs.mask.shape == (2, 2, 4)
    assert_trees_equal(pairs.side(0), collate(ROWS, shape))
    assert_trees_equal(pairs.side(1), collate(other, shape))
    rows = [row for pair in zip(ROWS, other, strict=True) for row in pair]
    assert_trees_equal(pairs.flattened(), collate(rows, shape))
    assert_trees_equal(pairs.flattened().mask, pairs.mask.reshape(4, 4))


def test_sides_of_pairs_have_their_own_counts():
    pairs = collate_pairs(ROWS, ROWS[::-1], PadShape(6, 4))._replace(
        num_tokens=np.array([6.0, 5.0]), num_sequences=np.array([2.0, 1.5])
    )
    assert (pairs.side(1).num_tokens, pairs.side(1).num_sequences) == (5.0, 1.5)
    assert (pairs.flattened().num_tokens, pairs.flattened().num_sequences) == (11.0, 3.5)
    assert isinstance(pairs.side(0), CompletionBatch)


@pytest.mark.parametrize("shape", [PadShape(4, 4), PadShape(6, 3)])
def test_a_row_longer_than_the_shape_is_never_cut(shape):
    with pytest.raises(ValueError, match="broadcast"):
        collate(ROWS, shape)


@pytest.mark.parametrize(("rows", "batch"), [(12, 4), (10, 4), (3, 8), (1, 2)])
def test_every_row_comes_once_before_any_comes_twice(rows, batch):
    at = shuffled_batches(rows, batch, seed=0)
    passes = 5
    drawn = np.concatenate([at(step) for step in range(-(-rows * passes // batch))])
    for i in range(passes):
        assert sorted(drawn[i * rows : (i + 1) * rows].tolist()) == list(range(rows))


def test_every_batch_is_full():
    at = shuffled_batches(10, 4, seed=0)
    assert all(at(step).shape == (4,) for step in range(20))


def test_random_access_equals_going_through():
    through = shuffled_batches(20, 6, seed=3)
    expected = [through(step).tolist() for step in range(30)]
    jumping = shuffled_batches(20, 6, seed=3)
    for step in np.random.default_rng(0).permutation(30).tolist() * 2:
        assert jumping(step).tolist() == expected[step]


def test_another_seed_and_another_pass_give_another_order():
    first, other = shuffled_batches(50, 50, seed=0), shuffled_batches(50, 50, seed=1)
    assert first(0).tolist() != list(range(50))
    assert first(0).tolist() != other(0).tolist()
    assert first(0).tolist() != first(1).tolist()


def test_fixed_batches_repeat_the_last_item_and_say_how_many_count():
    assert list(fixed_batches("abcde", 2)) == [
        (["a", "b"], 2),
        (["c", "d"], 2),
        (["e", "e"], 1),
    ]
    assert list(fixed_batches([1, 2], 2)) == [([1, 2], 2)]
    assert list(fixed_batches([1], 4)) == [([1, 1, 1, 1], 1)]
    assert list(fixed_batches([], 4)) == []
