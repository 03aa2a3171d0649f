"""Runs `sequential` and kills its own process with SIGKILL inside of a stage.

usage: killed_sequence.py STAGE COUNT ARG...   (dies at the COUNTth item of stages of this name)
"""

import os
import signal
import sys


def arm(stage, count):
    from cipo_jax.runs.context import Run

    resumable_map, seen = Run.resumable_map, 0

    def patched(self, name, kind, items, work, on_item):
        def deadly(missing):
            nonlocal seen
            for part in work(missing):
                seen += self.stage_name == stage
                if self.stage_name == stage and seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield part

        return resumable_map(self, name, kind, items, deadly, on_item)

    Run.resumable_map = patched


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    from cipo_jax.__main__ import main

    sys.exit(main(sys.argv[3:]))
