"""The process of an engine, whatever is measured: it answers questions and measures the cost.

It runs in other libraries' environments too, so that nothing is imported here but what every Python
has; the functions that name a library are called by engines that have it.
"""

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path

SIZE = 2048  # of the matrices that give a library's limit


def best_of(function, repeats=5):
    """Seconds of the fastest call; one more goes before."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def jax_matmul():
    """Seconds of JAX's product of two matrices."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
    product = jax.jit(lambda x: jnp.dot(x, x))
    return best_of(lambda: product(x).block_until_ready())


def torch_matmul():
    """Seconds of torch's product of two matrices."""
    import torch

    x = torch.randn(SIZE, SIZE)
    return best_of(lambda: x @ x)


class Compiles:
    """What XLA's compiler has taken so far."""

    def __init__(self):
        import jax

        self.seconds, self.count = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += seconds
            self.count += 1


def status(field):
    """A field of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this kernel has no {field}")


def give_back():
    """Returns freed memory to the kernel, so that what stays is what is in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _forget_peak():
    """Starts VmHWM anew; whether the kernel lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _busy():
    """Processor seconds of everything on this machine, and of this process."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, soft, steal = map(int, fields[:8])
    everything = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return everything, time.process_time()


def timed(compiles, function, *arguments):
    """What the call gave, and what it took: seconds, memory, compilations, what others did."""
    before = (compiles.seconds, compiles.count) if compiles else (0.0, 0)
    reset = _forget_peak()
    everything, own = _busy()
    start = time.perf_counter()
    made = function(*arguments)
    seconds = time.perf_counter() - start
    everything, own = (now - then for now, then in zip(_busy(), (everything, own), strict=True))
    report = {
        "seconds": seconds,
        "peak": status("VmHWM"),
        "reset": reset,
        "others": max(everything - own, 0.0),
    }
    if compiles:
        report["compile_seconds"] = compiles.seconds - before[0]
        report["compiles"] = compiles.count - before[1]
    return made, report


def serve(make, about, answer):
    """Answers the lines of stdin, JSON each, until it ends.

    `make()` opens the engine, which has `matmul` and `compiles`; `about(engine)` describes it once
    it is open, and `answer(engine, asked)` answers a question. "matmul" stands for measuring the
    library's limit.
    """
    # Libraries print as well; what they print is not to be taken for an answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = None

    def limit():
        return {"matmul": 2 * SIZE**3 / engine.matmul()}

    def begin():
        nonlocal engine
        engine = make()
        return limit() | about(engine)

    def say(function, *arguments):
        try:
            report = function(*arguments)
        except Exception as error:
            traceback.print_exc()
            report = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(report) + "\n")
        out.flush()
        return report

    if "error" in say(begin):
        return
    for line in sys.stdin:
        asked = json.loads(line)
        say(*((limit,) if asked == "matmul" else (answer, engine, asked)))
