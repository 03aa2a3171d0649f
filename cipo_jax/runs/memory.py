"""Peak memory of the process, and a count of the programs that it compiled."""

import contextlib
import functools
import os
import resource
from pathlib import Path

import jax
import jax.monitoring


def reset_peak_memory() -> None:
    """Makes `peak_memory_bytes` count from now on, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Peak memory: the devices' where they report it, else the host's resident set."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    if len(known) == len(peaks):
        return int(sum(known))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _CompilationCounter:
    """Counts the programs that XLA compiles in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: object) -> None:
        del duration_secs, kwargs
        self.count += event == "/jax/core/compile/backend_compile_duration"


@functools.cache  # JAX keeps its listeners for good: one serves all runs of a process.
def _counter() -> _CompilationCounter:
    return _CompilationCounter()


def compilation_count() -> int:
    """Programs compiled since the first call in this process."""
    return _counter().count
