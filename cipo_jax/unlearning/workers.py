"""A comparison's trials in several processes of one machine, each on its own cores.

The update step of a small model leaves most of a second core idle: two processes of a core each get
through 1.5 times the trials that one of two cores does.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait

from absl import logging

from cipo_jax.config import Config
from cipo_jax.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, Preempted, UserError, exit_code
from cipo_jax.unlearning.run_folder import RunFolder


def cores_of(workers: int) -> list[list[int]]:
    """The cores of each of at most `workers` processes; neighbors stay together.

    Empty lists where the system does not say or pin (macOS).
    """
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(min(workers, os.cpu_count() or 1))]
    cores = sorted(os.sched_getaffinity(0))
    count = min(workers, len(cores))
    return [cores[i * len(cores) // count : (i + 1) * len(cores) // count] for i in range(count)]


def run_workers(
    config: Config, folder: RunFolder, workers: int, tell: Callable[[str], None]
) -> None:
    """Has processes do all trials of a comparison; what they did is in its folder.

    Args:
      config: of the comparison.
      folder: of the comparison.
      workers: at most so many processes; none on an accelerator, which one process has to itself.
      tell: prints a line.

    Raises:
      UserError: where one of them stopped for what a user can mend.
      Preempted: where one of them, or this process, was asked to stop; all have stopped then.
      RuntimeError: where one of them crashed.
    """
    import jax

    if jax.default_backend() != "cpu":
        tell(f"one process: config.compare.workers = {workers} is for a CPU's cores")
        return
    # Spawned: JAX's threads do not outlive a fork.
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(config, str(folder.path), cores))
        for cores in cores_of(workers)
    ]
    for process in processes:
        process.start()
    told = False
    while any(process.is_alive() for process in processes):
        time.sleep(0.2)
        ended = any(process.exitcode for process in processes)
        if (ended or folder.stop_asked) and not told:
            told = True
            # They save and stop. A signal to the whole group has reached them as well, and the same
            # one once more would kill them.
            number = signal.SIGINT if folder.stop_signal == signal.SIGTERM else signal.SIGTERM
            for process in processes:
                if process.is_alive() and process.pid:
                    os.kill(process.pid, number)
    folder.stop_if_asked()
    codes = {process.exitcode or 0 for process in processes}
    # Others were told to stop, some of them before they listened.
    fine = {0, EXIT_PREEMPTED} | ({-signal.SIGINT, -signal.SIGTERM} if told else set())
    if codes - fine == {EXIT_USER_ERROR}:
        raise UserError("a worker stopped on the line above; mend it and run the same command")
    if codes - fine:
        raise RuntimeError(f"workers of the comparison ended with exit codes {sorted(codes)}")
    if EXIT_PREEMPTED in codes:
        raise Preempted(f"a worker was stopped; {folder.resume_hint()}")


def _work(config: Config, workdir: str, cores: Sequence[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)  # Before JAX counts them.
    logging.set_verbosity(logging.ERROR)  # As in the process that started it.
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def work() -> int:
        from cipo_jax.progress import Reporter
        from cipo_jax.unlearning.compare import Comparison

        Comparison(config, workdir, Reporter(), claim=False).work()
        return 0

    sys.exit(exit_code(work))


def _end_with_parent() -> None:
    """Asks this process to stop when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
