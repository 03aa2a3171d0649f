"""The ledger of a run folder: which stages have happened, what they were made from, how long.

``stages.json`` is written atomically and last: a stage that is entered there is whole. A stage's
fingerprint is that of its function and its inputs, never the order of calls.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cipo_jax.errors import UserError
from cipo_jax.files import atomic_write_text, to_json
from cipo_jax.runs.identity import digest
from cipo_jax.typing import Json

LAYOUT = 2
CLOCK_S = 1.0  # Seconds between two saves of the clock inside of a stage.


@dataclasses.dataclass(frozen=True)
class StageIdentity:
    """What a stage is made from.

    Attributes:
      function: name and version of the stage function.
      inputs: the fingerprint of each input, by the name of the function's parameter.
    """

    function: str
    inputs: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        return digest(json.dumps([self.function, dict(self.inputs)], sort_keys=True))


@dataclasses.dataclass(frozen=True)
class StageEntry:
    """A stage that has happened.

    Attributes:
      identity: what it was made from.
      seconds: of all processes that worked on it.
      result: the small fields of its result, as JSON.
    """

    identity: StageIdentity
    seconds: float
    result: dict[str, Json]

    def to_json(self) -> dict[str, Json]:
        return {
            "function": self.identity.function,
            "inputs": dict(self.identity.inputs),
            "fingerprint": self.identity.fingerprint,
            "seconds": self.seconds,
            "result": self.result,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "StageEntry":
        identity = StageIdentity(row["function"], row["inputs"])
        return cls(identity, row["seconds"], row["result"])


@dataclasses.dataclass(frozen=True)
class _Unfinished:
    """A stage that was begun and has not ended."""

    identity: StageIdentity
    seconds: float

    def to_json(self) -> dict[str, Json]:
        return {
            "function": self.identity.function,
            "inputs": dict(self.identity.inputs),
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "_Unfinished":
        return cls(StageIdentity(row["function"], row["inputs"]), row["seconds"])


class Ledger:
    """The stages of one run folder and the clock of the stage under way."""

    def __init__(self, folder: Path):
        """Reads the ledger of a folder, if there is one.

        Raises:
          UserError: where the folder was made by a version with another layout.
        """
        self.path = folder / "stages.json"
        self._entries: dict[str, StageEntry] = {}
        self._unfinished: dict[str, _Unfinished] = {}
        self._startup = 0.0
        self._stage, self._since = "", time.monotonic()
        self.reload()

    def reload(self) -> None:
        """Takes in what other processes have entered; no stage may be under way here."""
        if not self.path.exists():
            return
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            layout = saved.get("layout")
        except (ValueError, AttributeError):
            raise UserError(f"{self.path}: not JSON; choose another --workdir") from None
        if layout != LAYOUT:
            raise UserError(
                f"{self.path}: this run folder has the layout of another version of cipo_jax "
                f"(layout {layout or 1}, here {LAYOUT}); go on with that version, or choose "
                "another --workdir"
            )
        entries = {name: StageEntry.from_json(row) for name, row in saved["stages"].items()}
        self._entries = entries | self._entries
        # Of the file alone: a stage that was begun may have been ended by another process.
        begun = {name: _Unfinished.from_json(row) for name, row in saved["unfinished"].items()}
        self._unfinished = begun
        if self._stage not in begun:
            self._stage = ""
        self._startup = max(self._startup, saved["startup_seconds"])

    def find(self, name: str, identity: StageIdentity) -> StageEntry | None:
        """The entry of a stage, or None where it has not happened.

        Raises:
          UserError: naming the input that differs, where it was made from something else.
        """
        entry = self._entries.get(name)
        if entry is not None:
            self._check(name, entry.identity, identity)
        return entry

    def _check(self, name: str, made: StageIdentity, asked: StageIdentity) -> None:
        if made != asked:
            raise UserError(
                f"{self.path}: stage {name} was made from other inputs "
                f"({_difference(made, asked)}); choose another --workdir"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """Names of the stages that have happened, in the order in which they ended."""
        return list(self._entries)

    def result(self, name: str) -> dict[str, Any]:
        """The small fields of a stage's result."""
        return self._entries[name].result

    def begin(self, name: str, identity: StageIdentity) -> None:
        """Starts a stage, or goes on with one that another process began, and its clock.

        Raises:
          UserError: naming the input that differs, where it was begun from something else.
        """
        begun = self._unfinished.get(name)
        if begun is None:
            self._unfinished[name] = _Unfinished(identity, 0.0)
        else:
            self._check(name, begun.identity, identity)
        self._stage, self._since = name, time.monotonic()
        self._write()  # What the stage saves on its way belongs to this identity from here on.

    def enter(self, name: str, identity: StageIdentity, result: dict[str, Json]) -> None:
        """Enters the stage under way as done."""
        self.tick()
        seconds = self._unfinished.pop(name).seconds
        self._entries[name] = StageEntry(identity, seconds, result)
        self._stage = ""
        self._write()

    # The clock.

    def tick(self) -> None:
        """Adds the time since the last tick to the stage under way."""
        now = time.monotonic()
        if self._stage:
            begun = self._unfinished[self._stage]
            spent = begun.seconds + now - self._since
            self._unfinished[self._stage] = dataclasses.replace(begun, seconds=spent)
        self._since = now

    def save(self) -> None:
        """Saves the clock together with work that was saved inside of a stage."""
        self.tick()
        self._write()

    def save_now_and_then(self) -> None:
        """Saves the clock at most once in `CLOCK_S`: a synced file takes longer than small work."""
        if time.monotonic() - self._since >= CLOCK_S:
            self.save()

    def count_startup(self, seconds: float) -> None:
        """Adds the time that a process took until its first stage."""
        self._startup += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage, and of "startup", over all processes that worked on the run."""
        spent = {name: entry.seconds for name, entry in self._entries.items()}
        return ({"startup": self._startup} if self._startup else {}) | spent

    @property
    def stage(self) -> str:
        """The stage under way; "" for none."""
        return self._stage

    def _write(self) -> None:
        state = {
            "layout": LAYOUT,
            "stages": {name: entry.to_json() for name, entry in self._entries.items()},
            "unfinished": {name: begun.to_json() for name, begun in self._unfinished.items()},
            "startup_seconds": self._startup,
        }
        atomic_write_text(self.path, to_json(state))


def _difference(made: StageIdentity, asked: StageIdentity) -> str:
    """Names what differs between two identities of a stage."""
    names = made.inputs.keys() | asked.inputs.keys()
    changed = sorted(n for n in names if made.inputs.get(n) != asked.inputs.get(n))
    if made.function != asked.function:
        return f"function {made.function} there, {asked.function} now"
    return f"changed: {', '.join(changed)}"
