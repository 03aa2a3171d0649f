"""Commands in processes of their own, as a user starts them, and what they leave behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Settings with which a run of the quickstart takes seconds.
SMALL = (
    "--config.forget.count=1",
    "--config.data.valid_rows=4",
    "--config.data.eval_rows=8",
    "--config.sampling.max_batch_size=16",
    "--config.eval.max_batch_size=16",
    "--config.counterfactual.num_candidates=2",
    "--config.counterfactual.rounds=2",
    "--config.cipo.iterations=2",
    "--config.cipo.reject=all",
    "--config.model.retrained=",
    "--config.warmup.batch_size=8",
    "--config.warmup.retain_batch_size=4",
    "--config.warmup.reasoning_batch_size=4",
    "--config.train.batch_size=8",
    "--config.train.retain_batch_size=4",
    "--config.train.reasoning_batch_size=4",
)


def environment(programs=None):
    """Of a user's process: real devices, everything optimized.

    Args:
      programs: a folder that keeps compiled programs, so that several processes compile once.
    """
    names = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    found = {k: v for k, v in os.environ.items() if k not in names} | {"JAX_PLATFORMS": "cpu"}
    if programs is None:
        return found
    return found | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run(env, *command, timeout=600, **how):
    """`python COMMAND` in the project's folder, until it ends."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, **how,
    )  # fmt: skip


def read(path):
    """The value of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_rows(path):
    """The values of a JSON Lines file."""
    # As the package writes them: texts may hold other characters that end a line.
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
