"""Prompts and completions that enter a batch on the device, and completions that the host ends."""

import jax
import jax.numpy as jnp

from cipo_jax.sampling.state import IDLE, KEY_IMPL, Rows
from cipo_jax.typing import Array, Bool, Int, Params, UInt


def put_groups(
    old: Params, new: Params, source: Int[Array, " P"], into: Int[Array, " P"]
) -> Params:
    """Copies groups new[source] over old[into], for any arrays with leading G.

    Entries of `into` beyond G are ignored. Arrays of `new` may be shorter along their other axes.
    """

    def one(old: Array, new: Array) -> Array:
        where = (into, *map(slice, new.shape[1:]))
        return old.at[where].set(new[source], mode="drop")

    return jax.tree.map(one, old, new)


def copy_groups(tree: Params, source: Int[Array, " P"], into: Int[Array, " P"]) -> Params:
    """Copies groups `source` over groups `into` of the same arrays; donate them.

    All are read before any is written. Entries of `into` beyond G are ignored.
    """
    return jax.tree.map(lambda x: x.at[into].set(x[source], mode="drop"), tree)


def start_rows(
    rows: Rows,
    key: UInt[Array, " k"],
    start: Bool[Array, "G w"],
    items: UInt[Array, "G w"],
    samples: UInt[Array, "G w"],
    limits: Int[Array, "G w"],
    closed: Bool[Array, "G w"],
) -> Rows:
    """Starts new completions in some rows.

    Args:
      rows: the present state.
      key: key data of the job's PRNG key; a row's key is fold_in(fold_in(key, item), sample).
      start: which rows start.
      items: item number of each row.
      samples: sample number of each row.
      limits: greatest number of tokens of each row.
      closed: whether the prefill of the row closes the think block.
    """
    job_key = jax.random.wrap_key_data(key, impl=KEY_IMPL)
    fold = jax.vmap(jax.vmap(lambda i, s: jax.random.fold_in(jax.random.fold_in(job_key, i), s)))
    fresh = Rows(
        token=jnp.zeros_like(rows.token),
        num_drawn=jnp.zeros_like(rows.num_drawn),
        limit=limits,
        active=jnp.ones_like(rows.active),
        keys=fold(items, samples),
        closed=closed,
        recent=jnp.full_like(rows.recent, IDLE),
        seen=jnp.zeros_like(rows.seen),
    )

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(start.reshape(start.shape + (1,) * (old.ndim - 2)), new, old)

    return jax.tree.map(choose, fresh, rows)


def end_rows(rows: Rows, end: Bool[Array, "G w"]) -> Rows:
    """Ends the completions of some rows."""
    return rows._replace(active=rows.active & ~end)
