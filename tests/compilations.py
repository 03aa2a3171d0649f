"""Which programs XLA compiles while a test runs."""

import contextlib

import jax.monitoring

_watching = []


def _on_event(event, duration, **more):
    del duration
    if event == "/jax/core/compile/backend_compile_duration":
        for names in _watching:
            names.append(more["fun_name"])


jax.monitoring.register_event_duration_secs_listener(_on_event)


@contextlib.contextmanager
def compiled():
    """A list of the functions that are compiled inside of the block, such as "jit(_update)"."""
    names = []
    _watching.append(names)
    try:
        yield names
    finally:
        # By identity: two lists of the same names are equal.
        _watching[:] = [other for other in _watching if other is not names]
