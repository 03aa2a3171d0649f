"""The run folder: stages that have happened or have not, and everything a person can read later.

A stage writes its files under their final names only when they are whole, and is entered in
``stages.json`` last, with a fingerprint of all that went into it. A run that is killed anywhere and
started again repeats at most the batch or the steps it was in, and draws the same numbers.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from cipo_jax.config import flatten
from cipo_jax.errors import Preempted, UserError
from cipo_jax.files import atomic_write_text, read_jsonl, write_jsonl

Row = dict[str, Any]

_CLOCK_S = 1.0  # between two times that the clock is saved

# The folders that this process has taken, by path.
_CLAIMS: dict[str, IO[str]] = {}


def to_json(value: Any) -> str:
    """Indented JSON, one newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


class RunFolder:
    """One run's folder, its stages and its clock."""

    def __init__(
        self, path: str | Path, config: Any, fingerprint: str, parent: "RunFolder | None" = None
    ):
        """Opens or makes the folder.

        Args:
          path: the folder (``--workdir``).
          config: the run's frozen config, written to config.json.
          fingerprint: of the model and the data that the run starts from.
          parent: the folder of a run that this one belongs to: who is asked to stop there stops
            here.

        Raises:
          UserError: where the folder holds a run of another config, model or data.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--workdir={path}: is a file; give a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._same_config(dataclasses.asdict(config))
        self._stages: dict[str, Row] = {}
        self._partial: dict[str, float] = {}
        self._read()
        self._held = False
        self._chain = hashlib.sha256(
            (fingerprint + json.dumps(dataclasses.asdict(config), sort_keys=True)).encode()
        ).hexdigest()[:16]
        self._stage, self._since = "", time.monotonic()
        self._met: set[str] = set()
        self._stop: list[int] = parent._stop if parent else []  # Signals that asked for it.

    def _same_config(self, config: Row) -> None:
        path = self.path / "config.json"
        if not path.exists():
            atomic_write_text(path, to_json(config))
            return
        try:
            old = flatten(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            raise UserError(f"{path}: not JSON; choose another --workdir") from None
        new = flatten(json.loads(json.dumps(config)))
        differ = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        if differ:
            shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in differ[:5])
            more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise UserError(
                f"{path}: this folder holds a run with another config ({shown}{more}); "
                "choose another --workdir, or the config it was made with"
            )

    # Stages.

    def once(self, name: str, make: Callable[[], Row | None], outputs: Sequence[str] = ()) -> Row:
        """Runs a stage unless it has happened; returns the small result that it was entered with.

        Args:
          name: of the stage.
          make: does the work, writes the outputs, returns what to remember (JSON).
          outputs: files or folders that it leaves, relative to the run folder.

        Raises:
          UserError: where the stage was made from another model, data or config.
        """
        if name in self._met:  # Asked for again, by another user of what it made.
            return self._stages[name]["result"]
        self._chain = hashlib.sha256(f"{self._chain}/{name}".encode()).hexdigest()[:16]
        chain = self._chain
        if not self._has(name, chain, outputs):
            with self.alone():
                if not self._has(name, chain, outputs):  # Nor has another process made it.
                    self._make(name, chain, make)
        self._met.add(name)
        return self._stages[name]["result"]

    def _has(self, name: str, chain: str, outputs: Sequence[str]) -> bool:
        record = self._stages.get(name)
        if record is not None and record["fingerprint"] != chain:
            raise UserError(
                f"{self.path / 'stages.json'}: stage {name} was made from other inputs: the model "
                "or the data has changed since; choose another --workdir"
            )
        return record is not None and all((self.path / output).exists() for output in outputs)

    def _make(self, name: str, chain: str, make: Callable[[], Row | None]) -> None:
        self._stage, self._since = name, time.monotonic()
        result = make() or {}
        self.tick()
        seconds = self._partial.pop(name, 0.0)
        self._stages[name] = {"fingerprint": chain, "seconds": seconds, "result": result}
        self._stage = ""
        self._save()
        shutil.rmtree(self.path / ".parts" / chain, ignore_errors=True)
        with contextlib.suppress(OSError):  # Another stage's parts are still there, or none were.
            (self.path / ".parts").rmdir()

    def claim(self) -> None:
        """Takes the folder for this process until it ends.

        Raises:
          UserError: where another process is at work in it.
        """
        key = str(self.path.resolve())
        if key in _CLAIMS:
            return
        file = (self.path / ".claim").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"--workdir={self.path}: another process is at work there; wait for it, or choose "
                "another folder"
            ) from None
        except OSError:  # A file system that cannot lock.
            pass
        _CLAIMS[key] = file

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes from making a stage of this folder; waits for one that does."""
        if self._held:
            yield
            return
        with (self.path / ".lock").open("a") as file:
            # Not every file system can lock, and not every run has company.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            self._held = True
            self._read()
            try:
                yield
            finally:
                self._held = False

    def _read(self) -> None:
        """Takes in what other processes have entered."""
        if (self.path / "stages.json").exists():
            saved = json.loads((self.path / "stages.json").read_text(encoding="utf-8"))
            self._stages = saved["stages"] | self._stages
            self._partial = saved["unfinished_seconds"] | self._partial

    def result(self, name: str) -> Row:
        """What a stage that has happened was entered with."""
        return self._stages[name]["result"]

    @property
    def stages(self) -> dict[str, Row]:
        """The entries of all stages that have happened."""
        return self._stages

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage, over all processes that worked on it."""
        return {name: record["seconds"] for name, record in self._stages.items()}

    def count_startup(self, seconds: float) -> None:
        """Adds what it took a process to get ready, so that the total leaves nothing out."""
        record = self._stages.setdefault(
            "startup", {"fingerprint": "", "seconds": 0.0, "result": {}}
        )
        record["seconds"] += seconds

    def tick(self) -> None:
        """Enters the time since the last tick to the present stage; done where work is saved."""
        now = time.monotonic()
        if self._stage:
            self._partial[self._stage] = self._partial.get(self._stage, 0.0) + now - self._since
        self._since = now

    def saved(self) -> None:
        """Called after work within a stage was saved: keeps the clock with it."""
        self.tick()
        self._save()

    def _save(self) -> None:
        state = {"stages": self._stages, "unfinished_seconds": self._partial}
        atomic_write_text(self.path / "stages.json", to_json(state))

    # Work within a stage that is saved in parts.

    def in_parts(
        self,
        name: str,
        count: int,
        work: Callable[[list[int]], Iterable[tuple[int, list[Row]]]],
        on_part: Callable[[list[Row], bool], None] = lambda rows, cached: None,
    ) -> list[Row]:
        """Rows of `count` items in their order; each item's are kept as soon as they are there.

        Args:
          name: of the stage (a suffix after "/" tells several such loops of a stage apart).
          count: of the items.
          work: from the items that are missing to (item, its rows), in whatever order they come.
          on_part: called with each item's rows and whether an earlier process had made them.

        Raises:
          Preempted: between two items, if the process was asked to stop.
        """
        path = self._parts(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        made: dict[int, list[Row]] = {}
        with path.open("ab+") as file:
            file.seek(0)
            whole = 0
            for line in file:
                if not line.endswith(b"\n"):  # The process that wrote it was killed.
                    break
                whole += len(line)
                part = json.loads(line)
                made[part["item"]] = part["rows"]
            file.truncate(whole)
            for item in sorted(made):
                on_part(made[item], True)
            missing = [item for item in range(count) if item not in made]
            for item, rows in work(missing) if missing else ():
                part = json.dumps({"item": item, "rows": rows}, ensure_ascii=False)
                file.write(part.encode() + b"\n")
                file.flush()
                # The clock alone: a synced file for every completion would take longer than it.
                if time.monotonic() - self._since >= _CLOCK_S:
                    self.saved()
                made[item] = rows
                on_part(rows, False)
                self.stop_if_asked()
        return [row for item in range(count) for row in made[item]]

    def _parts(self, name: str) -> Path:
        return self.path / ".parts" / self._chain / f"{name}.jsonl"

    def write_rows(self, name: str, rows: Sequence[Row]) -> None:
        write_jsonl(self.path / name, rows)

    def read_rows(self, name: str) -> list[Row]:
        return read_jsonl(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        atomic_write_text(self.path / name, to_json(value))

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    # A polite end.

    def listen(self) -> None:
        """From now on SIGTERM and SIGINT ask the run to save and stop; a second one kills it."""

        def handle(number: int, frame: FrameType | None) -> None:
            del frame
            self._stop.append(number)
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handle)

    @property
    def stop_asked(self) -> bool:
        return bool(self._stop)

    @property
    def stop_signal(self) -> int | None:
        """The signal that asked for it first."""
        return self._stop[0] if self._stop else None

    def stop_if_asked(self) -> None:
        """Raises Preempted if the process was asked to stop; what is done so far is saved."""
        if self.stop_asked:
            self.saved()
            where = f" in stage {self._stage}" if self._stage else ""
            raise Preempted(f"stopped on request{where}; {self.resume_hint()}")

    def resume_hint(self) -> str:
        return f"run the same command again to go on (run folder: {self.path})"


class MetricsLog:
    """metrics.jsonl and TensorBoard events, without a step twice after a restart."""

    def __init__(self, folder: RunFolder):
        self._path = folder.path / "metrics.jsonl"
        self._events = folder.path / "tensorboard"
        self._writer: Any = None

    def rewind(self, step: int) -> None:
        """Drops what was logged beyond a global step: it is about to be done again."""
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
        """Logs a global step's metrics."""
        row = {"step": step, "phase": phase} | values
        with self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(f"{phase.split('-')[0]}/{name}", value, step)

    def last(self, phase: str) -> dict[str, Any]:
        """What was logged of the last step of a phase that has ended."""
        rows = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return [row for row in rows if row["phase"] == phase][-1]

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def restart_peak_memory() -> None:
    """Has `peak_memory_bytes` count from now on, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Peak memory of this process: the devices' where they tell, else the host's resident set."""
    import resource

    import jax

    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    if all(p is not None for p in peaks):
        return int(sum(p for p in peaks if p is not None))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
