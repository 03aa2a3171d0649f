"""metrics.jsonl and TensorBoard events, each step once whatever restarts there were."""

import json
from pathlib import Path
from typing import Any

from cipo_jax.files import write_jsonl


class MetricsLog:
    """The metrics of each update step of a run."""

    def __init__(self, folder: Path):
        self._path, self._events = folder / "metrics.jsonl", folder / "tensorboard"
        self._writer: Any = None

    def rewind(self, step: int) -> None:
        """Drops what was logged after a global step: these steps are about to be done again."""
        if self._path.exists():
            kept = []
            for line in self._path.read_text(encoding="utf-8").split("\n"):
                try:
                    row = json.loads(line)
                except ValueError:  # The line that a killed process was writing.
                    continue
                if row["step"] <= step:
                    kept.append(row)
            write_jsonl(self._path, kept)
        from tensorboardX import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self._events), purge_step=step + 1)

    def write(self, step: int, phase: str, values: dict[str, float]) -> None:
        """Logs the metrics of a global step, counted from 1."""
        row = {"step": step, "phase": phase} | values
        with self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(f"{phase.split('-')[0]}/{name}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
