"""Arrays of a batch for another shape: other groups, rows, prompt slots or ring slots."""

import jax
import jax.numpy as jnp

from cipo_jax.ops.attention import KV
from cipo_jax.sampling.state import IDLE, Rows, map_slots
from cipo_jax.typing import Array, Int, Params


def take_groups(tree: Params, groups: Int[Array, " G"]) -> Params:
    """Arrays with leading G, for other groups."""
    return jax.tree.map(lambda x: x[groups], tree)


def take_prompts(kv: KV, groups: Int[Array, " G"], slots: int) -> KV:
    """A layer's keys and values of the prompts, for other groups and another number of slots."""
    kv = take_groups(kv, groups)
    return map_slots(lambda x, axis: _resized(x, axis, slots), kv)


def take_rows(rows: Rows, taken: Int[Array, "G w"]) -> Rows:
    """The rows for another shape.

    Args:
      rows: the present state, [G', w'].
      taken: for each new row the index of the old one in G' x w'; `IDLE` for none.
    """

    def one(x: Array) -> Array:
        return _by_row(x)[jnp.maximum(taken, 0)]

    rows = jax.tree.map(one, rows)
    return rows._replace(active=rows.active & (taken != IDLE))


def take_ring(kv: KV, taken: Int[Array, "G w"], newest_slot: Int[Array, ""], slots: int) -> KV:
    """A layer's ring for the rows of another shape, rotated so that slot 0 is the oldest.

    The slot written last becomes the last slot of the new ring, or of the old one if the new one is
    longer: see `rotated_newest_slot`. A ring that becomes shorter loses its oldest slots.
    """
    R = kv.v.shape[2]
    kept = min(R, slots)
    order = (newest_slot - (kept - 1) + jnp.arange(kept)) % R

    def one(x: Array, axis: int) -> Array:
        x = x[jnp.maximum(taken, 0).reshape(-1)]
        return _resized(jnp.take(x, order, axis=axis), axis, slots)

    return map_slots(one, kv)


def rotated_newest_slot(old_slots: int, new_slots: int) -> int:
    """The slot written last, after `take_ring`."""
    return min(old_slots, new_slots) - 1


def _by_row(x: Array) -> Array:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _resized(x: Array, axis: int, size: int) -> Array:
    if size <= x.shape[axis]:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding)
