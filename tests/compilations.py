"""Counts the programs that are compiled."""

import contextlib
import dataclasses

import jax.monitoring


@dataclasses.dataclass
class Count:
    number: int = 0


_counts = {}


def _on_event(event, duration, fun_name="", **kwargs):
    del duration, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        for count, name in _counts.values():
            count.number += fun_name == f"jit({name})"


jax.monitoring.register_event_duration_secs_listener(_on_event)


@contextlib.contextmanager
def compilations(function_name):
    """Counts the compilations of a jitted function, by its name, within the context."""
    count = Count()
    _counts[id(count)] = count, function_name
    try:
        yield count
    finally:
        del _counts[id(count)]
