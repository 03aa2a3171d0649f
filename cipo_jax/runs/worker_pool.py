"""Processes of one machine beside each other, each on its own share of the CPU's cores.

The update step of a small model leaves most of a second core idle: two processes of a core each get
through 1.5 times the runs that one of two cores does.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

import jax
from absl import logging

from cipo_jax.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, Preempted, UserError, exit_code
from cipo_jax.runs.context import Run


def core_shares(workers: int) -> list[list[int]]:
    """The cores of each of at most `workers` processes; neighbors stay together.

    Empty lists where the system cannot pin a process (macOS).
    """
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(min(workers, os.cpu_count() or 1))]
    cores = sorted(os.sched_getaffinity(0))
    count = min(workers, len(cores))
    return [cores[i * len(cores) // count : (i + 1) * len(cores) // count] for i in range(count)]


def run_workers(
    work: Callable[..., None], arguments: Sequence[object], run: Run, workers: int
) -> None:
    """Calls a function in several processes, and waits for all of them.

    Args:
      work: a function of a module, which shares the work out by files of the run folder.
      arguments: its arguments; they are pickled.
      run: the run that the work belongs to; where it is preempted the processes are stopped.
      workers: number of processes, at most; none on an accelerator, which one process owns.

    Raises:
      UserError: where one of them stopped on bad input.
      Preempted: where one of them, or this process, was asked to stop; all have stopped then.
      RuntimeError: where one of them crashed.
    """
    if jax.default_backend() != "cpu":
        run.reporter.line(f"one process: workers = {workers} is for a CPU's cores")
        return
    # Spawned: JAX's threads do not outlive a fork.
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(work, arguments, cores))
        for cores in core_shares(workers)
    ]
    for process in processes:
        process.start()
    stopped = False
    while any(process.is_alive() for process in processes):
        time.sleep(0.2)
        ended = any(process.exitcode for process in processes)
        if (ended or run.preemption.preempted) and not stopped:
            stopped = True
            _stop(processes, run.preemption.signal)
    run.stop_if_preempted()
    _raise_for(processes, stopped, run.resume_hint())


def _stop(processes: Sequence[SpawnProcess], received: int | None) -> None:
    """Asks processes to save and stop.

    A signal to the whole group has reached them as well, and the same one again would kill them.
    """
    number = signal.SIGINT if received == signal.SIGTERM else signal.SIGTERM
    for process in processes:
        if process.is_alive() and process.pid:
            os.kill(process.pid, number)


def _raise_for(processes: Sequence[SpawnProcess], stopped: bool, hint: str) -> None:
    codes = {process.exitcode or 0 for process in processes}
    # Some of those that were stopped had not installed their handlers yet.
    fine = {0, EXIT_PREEMPTED} | ({-signal.SIGINT, -signal.SIGTERM} if stopped else set())
    if codes - fine == {EXIT_USER_ERROR}:
        raise UserError(
            "a worker stopped with the error above; correct it and run the same command again"
        )
    if codes - fine:
        raise RuntimeError(f"workers ended with exit codes {sorted(codes)}")
    if EXIT_PREEMPTED in codes:
        raise Preempted(f"a worker was stopped; {hint}")


def _work(work: Callable[..., None], arguments: Sequence[object], cores: Sequence[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)  # Before JAX counts them.
    logging.set_verbosity(logging.ERROR)  # As in the process that started it.
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def call() -> int:
        work(*arguments)
        return 0

    sys.exit(exit_code(call))


def _end_with_parent() -> None:
    """Asks this process to stop when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
