"""Orbax checkpoints: the parameters at the end of each phase, the whole state inside of one.

``checkpoints/NAME`` holds the parameters that a phase ended with; ``checkpoints/NAME.steps/STEP``
holds parameters, optimizer state and step in the middle of it. The data position needs no state
of its own: the order of the data is a pure function of (seed, phase, step). Orbax writes to a
temporary name and renames, so a checkpoint is there whole or not at all.
"""

import shutil
from pathlib import Path
from typing import Any

from cipo_jax.errors import UserError
from cipo_jax.typing import Params


class Checkpoints:
    """The checkpoints of one run. Phases are saved as {"params"} and, if kept, {"ema"}.

    With clean=False nothing in the folder is touched: the run may still be going on.
    """

    def __init__(self, root: str | Path, clean: bool = True):
        self.root = Path(root).absolute()
        if not clean:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        # What a killed process was in the middle of writing.
        for left in self.root.glob("**/*orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)

    def save_phase(self, name: str, params: Params) -> None:
        """Saves the parameters that a phase ends with, then drops its steps."""
        self._save(self.root / name, params)
        shutil.rmtree(self._steps(name), ignore_errors=True)

    def load_phase(self, name: str, abstract: Params) -> Params:
        """Restores a phase's parameters into the given shapes and shardings."""
        return self._load(self.root / name, abstract)

    def has_phase(self, name: str) -> bool:
        return (self.root / name).is_dir()

    def drop_phase(self, name: str) -> None:
        """Deletes a phase's parameters, should they be there."""
        shutil.rmtree(self.root / name, ignore_errors=True)

    def save_step(self, name: str, step: int, state: Any) -> None:
        """Saves the state after `step` steps of a phase, then drops earlier ones."""
        self._save(self._steps(name) / f"{step:08d}", state)
        for older in self._saved_steps(name)[:-1]:
            shutil.rmtree(self._steps(name) / f"{older:08d}")

    def latest_step(self, name: str) -> int | None:
        """The last saved step of a phase, if there is one."""
        steps = self._saved_steps(name)
        return steps[-1] if steps else None

    def load_step(self, name: str, step: int, abstract: Any) -> Any:
        """Restores the state after `step` steps into the given shapes and shardings."""
        return self._load(self._steps(name) / f"{step:08d}", abstract)

    def choose(self, name: str = "") -> tuple[str, int | None]:
        """A phase to export: the named one, or the last; and the step, where it is not finished.

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
        """The parameters alone, of a phase's end or of one of its steps."""
        path = self.root / name if step is None else self._steps(name) / f"{step:08d}"
        return self._load(path, {"params": abstract}, partial=True)["params"]

    def _steps(self, name: str) -> Path:
        return self.root / f"{name}.steps"

    def _saved_steps(self, name: str) -> list[int]:
        folder = self._steps(name)
        return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())

    @staticmethod
    def _save(path: Path, state: Any) -> None:
        from orbax.checkpoint import v1 as ocp

        ocp.save(str(path), state, overwrite=True)

    @staticmethod
    def _load(path: Path, abstract: Any, partial: bool = False) -> Any:
        from orbax.checkpoint import v1 as ocp

        options = ocp.options.PyTreeOptions(
            loading=ocp.options.PyTreeOptions.Loading(partial_load=partial)
        )
        with ocp.Context(pytree_options=options):
            return ocp.load(str(path), abstract)
