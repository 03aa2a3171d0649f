"""Runs a command of the package and kills its own process with SIGKILL at a named place.

usage: killed_run.py PLACE COUNT ARG...   (dies at the COUNTth time that it comes to PLACE)
"""

import os
import signal
import sys


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place, count):
    from cipo_jax.runs.context import Run
    from cipo_jax.training.checkpoints import Checkpoints
    from cipo_jax.training.step import TrainStep

    seen = 0

    def here():
        nonlocal seen
        seen += 1
        return seen == count

    if place in ("counterfactuals", "rollouts", "skills", "said"):
        resumable_map = Run.resumable_map

        def patched(self, name, kind, count, work, on_item):
            def deadly(missing):
                for item in work(missing):
                    if self.stage_name == place and here():
                        die()
                    yield item

            return resumable_map(self, name, kind, count, deadly, on_item)

        Run.resumable_map = patched
    elif place in ("update", "warm-up"):
        put, group = TrainStep.put, "pairs" if place == "update" else "chosen"

        def patched_put(self, batch):
            if group in batch and here():
                die()
            return put(self, batch)

        TrainStep.put = patched_put
    elif place == "checkpoint write":
        save = Checkpoints._save

        def patched_save(path, state):
            from orbax.checkpoint import v1 as ocp

            if here():
                ocp.save_async(str(path), state, overwrite=True)
                die()
            save(path, state)

        Checkpoints._save = staticmethod(patched_save)
    elif place == "after checkpoint":
        save_phase = Checkpoints.save_phase

        def patched_phase(self, name, result):
            save_phase(self, name, result)
            if here():
                die()

        Checkpoints.save_phase = patched_phase
    elif place == "terminate":  # SIGTERM, in the middle of an epoch
        put = TrainStep.put

        def polite(self, batch):
            if "pairs" in batch and here():
                os.kill(os.getpid(), signal.SIGTERM)
            return put(self, batch)

        TrainStep.put = polite
    elif place == "nan":
        put = TrainStep.put

        def poisoned(self, batch):
            if "pairs" in batch and here():
                batch = batch | {"ref": batch["ref"] * float("nan")}
            return put(self, batch)

        TrainStep.put = poisoned
    else:
        raise SystemExit(f"no place {place!r}")


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    from cipo_jax.__main__ import main

    sys.exit(main(sys.argv[3:]))
