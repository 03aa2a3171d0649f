"""Orbax checkpoints: the result of each phase, and the whole state in the middle of one.

``checkpoints/NAME`` holds the `PhaseResult` of a phase; ``checkpoints/NAME.steps/STEP`` holds the
`TrainState` after a step of it. Both are stored as dicts of their fields, without the empty ones.
The data position needs no state of its own: the order of the data is a pure function of (seed,
phase, step). Orbax writes to a temporary name and renames, so a checkpoint exists whole or not at
all.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import TypeVar

import jax

from cipo_jax.errors import UserError
from cipo_jax.training.step import PhaseResult, TrainState
from cipo_jax.typing import Params

_Struct = TypeVar("_Struct", PhaseResult, TrainState)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, root: str | Path, clean: bool = True):
        """Opens a folder of checkpoints.

        Args:
          root: the folder.
          clean: whether to make the folder and remove the remains of killed writes. False leaves
            it as it is, for a reader while the run may still be going on.
        """
        self.root = Path(root).absolute()
        if not clean:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        # Remains of writes that a kill interrupted.
        for left in self.root.glob("**/*orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)

    def save_phase(self, name: str, result: PhaseResult) -> None:
        """Saves the result of a phase, then deletes its steps."""
        self._save(self.root / name, _fields(result))
        shutil.rmtree(self._steps(name), ignore_errors=True)

    def load_phase(self, name: str, abstract: PhaseResult) -> PhaseResult:
        """Restores the result of a phase; `abstract` as of `TrainStep.abstract_result`.

        Its fields that are empty are not read.
        """
        return self._restore(self.root / name, abstract)

    def has_phase(self, name: str) -> bool:
        return (self.root / name).is_dir()

    def drop_phase(self, name: str) -> None:
        """Deletes the result of a phase, if there is one."""
        shutil.rmtree(self.root / name, ignore_errors=True)

    def save_step(self, name: str, step: int, state: TrainState) -> None:
        """Saves the state after `step` steps of a phase, then deletes earlier ones."""
        self._save(self._steps(name) / f"{step:08d}", _fields(state))
        for older in self._saved_steps(name)[:-1]:
            shutil.rmtree(self._steps(name) / f"{older:08d}")

    def latest_step(self, name: str) -> int | None:
        """The last saved step of a phase, if there is one."""
        steps = self._saved_steps(name)
        return steps[-1] if steps else None

    def load_step(self, name: str, step: int, abstract: TrainState) -> TrainState:
        """Restores the state after `step` steps; `abstract` as of `TrainStep.abstract_state`."""
        return self._restore(self._steps(name) / f"{step:08d}", abstract)

    def choose(self, name: str = "") -> tuple[str, int | None]:
        """A phase to export, the named one or the last, and its step if it is not finished.

        Raises:
          UserError: where there is no such phase, or none at all.
        """
        finished = {p.name: None for p in self.root.glob("*") if p.is_dir() and "." not in p.name}
        running = {p.name.removesuffix(".steps") for p in self.root.glob("*.steps")}
        started = {n: self.latest_step(n) for n in running if self.latest_step(n) is not None}
        phases = started | finished
        last = max(finished or started, key=lambda n: (n != "warmup", n), default="")
        chosen = name or last
        if chosen not in phases:
            there = ", ".join(sorted(phases)) or "none yet"
            raise UserError(f"{self.root}: no phase {name!r}; there: {there}")
        return chosen, phases[chosen]

    def load_params(self, name: str, step: int | None, abstract: Params) -> Params:
        """The parameters alone, of a finished phase or of one of its steps."""
        path = self.root / name if step is None else self._steps(name) / f"{step:08d}"
        return self._load(path, {"params": abstract}, partial=True)["params"]

    def _steps(self, name: str) -> Path:
        return self.root / f"{name}.steps"

    def _saved_steps(self, name: str) -> list[int]:
        folder = self._steps(name)
        return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())

    def _restore(self, path: Path, abstract: _Struct) -> _Struct:
        # More may be stored than is asked for, such as a moving average.
        loaded = self._load(path, _fields(abstract), partial=True)
        return dataclasses.replace(abstract, **loaded)

    @staticmethod
    def _save(path: Path, state: dict[str, Params]) -> None:
        from orbax.checkpoint import v1 as ocp

        ocp.save(str(path), state, overwrite=True)

    @staticmethod
    def _load(path: Path, abstract: dict[str, Params], partial: bool = False) -> dict[str, Params]:
        from orbax.checkpoint import v1 as ocp

        options = ocp.options.PyTreeOptions(
            loading=ocp.options.PyTreeOptions.Loading(partial_load=partial)
        )
        with ocp.Context(pytree_options=options):
            return ocp.load(str(path), abstract)


def _fields(struct: PhaseResult | TrainState) -> dict[str, Params]:
    """The fields that hold anything, by name."""
    fields = {f.name: getattr(struct, f.name) for f in dataclasses.fields(struct)}
    return {name: value for name, value in fields.items() if jax.tree.leaves(value)}
