"""A run: its config, model, data and folder, and `stage`, by which each step happens once.

A stage is a function of (run, inputs) that returns a `StageResult`. Its identity is the function's
version and the fingerprints of the inputs; the config of a run folder never changes. A run that is
killed anywhere and started again repeats at most the completion or the update steps it was in, and
computes the same bits.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp

from cipo_jax.data.records import Record
from cipo_jax.errors import Preempted, UserError
from cipo_jax.files import atomic_write_text, remove_stale_temporaries, to_json
from cipo_jax.models.trainable import Trainable
from cipo_jax.progress import Reporter
from cipo_jax.runs import locks
from cipo_jax.runs.identity import (
    derive_key,
    fingerprint,
    function_identity,
    input_names,
)
from cipo_jax.runs.ledger import Ledger, StageIdentity
from cipo_jax.runs.memory import compilation_count
from cipo_jax.runs.metrics import MetricsLog
from cipo_jax.runs.parts import OnItem, Work, resumable_map
from cipo_jax.runs.preemption import Preemption
from cipo_jax.runs.results import StageResult, result_class
from cipo_jax.runs.weights import BASE, WeightCache, Weights
from cipo_jax.runs.workspace import Workspace
from cipo_jax.settings import flatten
from cipo_jax.shared_config import RunConfig
from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.mesh import replicated
from cipo_jax.training.step import PhaseResult
from cipo_jax.typing import Array, Json, Params

WORKDIR = "workdir:"  # In config.json: a path that is relative to the run folder.

S = TypeVar("S", bound=StageResult)
R = TypeVar("R", bound=Record)
P = ParamSpec("P")


@dataclasses.dataclass
class _State:
    """What changes while a run goes on.

    Attributes:
      weights: the arrays that are in memory.
      results: results of this process, by stage name, with the identity they have.
      current: fingerprint of the stage under way; "" for none.
      exclusive: whether this process holds the folder's stage lock.
      compilations: of the process when they were last asked for.
      used: names of the stages of other runs that this one took results from.
    """

    weights: WeightCache
    results: dict[str, tuple[StageIdentity, StageResult]] = dataclasses.field(default_factory=dict)
    current: str = ""
    exclusive: bool = False
    compilations: int = dataclasses.field(default_factory=compilation_count)
    used: dict[str, None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, or a place inside of it.

    Attributes:
      config: every setting.
      workspace: model, data, samplers and scorer.
      folder: the run folder.
      reporter: the terminal.
      ledger: the stages that have happened.
      checkpoints: inside of the run folder.
      metrics: of each update step.
      preemption: whether the process was asked to stop.
      state: what changes; shared by all places of a run.
      prefix: the place, such as "iterations/01"; "" for the run itself.
      owners: runs that keep stages in place of this one, by a stage's name; see `shared`.
    """

    config: RunConfig
    workspace: Workspace
    folder: Path
    reporter: Reporter
    ledger: Ledger
    checkpoints: Checkpoints
    metrics: MetricsLog
    preemption: Preemption
    state: _State
    prefix: str = ""
    owners: Callable[[str], "Run | None"] = lambda name: None

    @classmethod
    def open(
        cls,
        config: RunConfig,
        workdir: str | Path,
        workspace: Workspace,
        reporter: Reporter,
        parent: "Run | None" = None,
        claim: bool = True,
        recorded: RunConfig | None = None,
    ) -> "Run":
        """Opens a run folder, or makes it.

        Args:
          config: every setting.
          workdir: the run folder.
          workspace: model and data.
          reporter: the terminal.
          parent: the run that this one belongs to, which is asked to stop together with it.
          claim: whether to keep other processes out of the folder; never of a parent's.
          recorded: the config as config.json keeps it, where that differs: paths may be relative
            to the run folder there, after `WORKDIR`.

        Raises:
          UserError: where the folder holds a run of another config or layout, or another process
            is at work in it.
        """
        folder = Path(workdir)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--workdir={workdir}: is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(folder)
        _keep_config(folder, recorded or config)
        if claim and parent is None:
            locks.acquire(folder)
            remove_stale_temporaries(folder)
        checkpoints = Checkpoints(folder / "checkpoints")
        run = cls(
            config=config,
            workspace=workspace,
            folder=folder,
            reporter=reporter,
            ledger=ledger,
            checkpoints=checkpoints,
            metrics=MetricsLog(folder),
            preemption=parent.preemption if parent else Preemption(),
            state=_State(WeightCache(lambda weights: run.load(weights))),
        )
        return run

    def derive(
        self,
        config: RunConfig,
        workdir: str | Path,
        trainable: Trainable,
        reporter: Reporter | None = None,
        recorded: RunConfig | None = None,
    ) -> "Run":
        """A run that belongs to this one, and shares with it what it can; see `open`."""
        workspace = self.workspace.derive(self.config, config, trainable)
        reporter = reporter or self.reporter
        return Run.open(config, workdir, workspace, reporter, self, recorded=recorded)

    # ---- places

    def at(self, prefix: str) -> "Run":
        """A place inside of this run: its stages and files stand under the prefix."""
        return dataclasses.replace(self, prefix=self._named(prefix))

    def shared(self, owners: Callable[[str], "Run | None"]) -> "Run":
        """The same run, but for the stages that `owners` says another run keeps."""
        return dataclasses.replace(self, owners=owners)

    def _named(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def path(self, name: str) -> Path:
        """A file or folder at this place."""
        return self.folder / self._named(name)

    # ---- stages

    def stage(self, name: str, function: Callable[..., S], *inputs: object) -> S:
        """The result of function(run, *inputs), computed once in the life of the run folder.

        Args:
          name: of the stage, and of its files.
          function: annotated to return a `StageResult`; see also `identity.stage_version`.
          *inputs: anything that has a fingerprint.

        Raises:
          UserError: naming the input that differs, where the stage was made from others.
          Preempted: where the process was asked to stop.
        """
        owner = self.owners(name)
        if owner is not None:
            self.state.used[name] = None
            result = owner.stage(name, function, *inputs)
            owner.state.weights.clear()  # It was asked for this stage alone.
            return result
        name = self._named(name)
        identity = self._identity(function, inputs)
        known = self.state.results.get(name)
        if known is not None and known[0] == identity:
            return cast(S, known[1])
        kind = cast(type[S], result_class(function))
        result = self._load(name, identity, kind)
        if result is None:
            with self._exclusive():
                result = self._load(name, identity, kind)  # Another process may have made it.
                if result is None:
                    result = self._make(name, identity, function, inputs)
        self.state.results[name] = (identity, result)
        return result

    def _identity(
        self, function: Callable[..., object], inputs: tuple[object, ...]
    ) -> StageIdentity:
        names = input_names(function, len(inputs))
        prints = {n: fingerprint(value) for n, value in zip(names, inputs, strict=True)}
        return StageIdentity(function_identity(function), prints)

    def _load(self, name: str, identity: StageIdentity, kind: type[S]) -> S | None:
        entry = self.ledger.find(name, identity)
        path = self.folder / name
        if entry is None or not all(file.exists() for file in kind.files(path)):
            return None
        return kind.load(path, entry.result)

    def _make(
        self,
        name: str,
        identity: StageIdentity,
        function: Callable[..., S],
        inputs: tuple[object, ...],
    ) -> S:
        self.ledger.begin(name, identity)
        before, self.state.current = self.state.current, identity.fingerprint
        try:
            result = function(dataclasses.replace(self, prefix=name), *inputs)
            self.ledger.enter(name, identity, result.save(self.folder / name))
        finally:
            self.state.current = before
        shutil.rmtree(self._parts(identity.fingerprint), ignore_errors=True)
        with contextlib.suppress(OSError):  # Another stage's parts are still there, or none were.
            (self.folder / ".parts").rmdir()
        return result

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self.state.exclusive:
            yield
            return
        with locks.exclusive(self.folder):
            self.state.exclusive = True
            self.ledger.reload()
            try:
                yield
            finally:
                self.state.exclusive = False

    @property
    def stage_name(self) -> str:
        """Inside of a stage function: the last part of the stage's name."""
        return self.prefix.rsplit("/", 1)[-1]

    def _parts(self, stage: str) -> Path:
        return self.folder / ".parts" / stage

    def resumable_map(
        self, name: str, kind: type[R], count: int, work: Work[R], on_item: OnItem[R]
    ) -> list[tuple[R, ...]]:
        """Inside of a stage: records of `count` items, each kept as soon as it is there.

        Args:
          name: distinguishes several such loops of a stage.
          kind: class of the records.
          count: number of items.
          work: from the items that are missing to (item, its records), in any order.
          on_item: called with each item's records and whether an earlier process had made them.

        Raises:
          Preempted: between two items, where the process was asked to stop.
        """

        def after() -> None:
            self.ledger.save_now_and_then()
            self.stop_if_preempted()

        path = self._parts(self.state.current) / f"{name}.jsonl"
        return resumable_map(path, kind, count, work, on_item, after)

    # ---- weights

    @property
    def base(self) -> Weights:
        """The model before training."""
        return Weights(BASE, f"{self.workspace.model.fingerprint}", 0)

    def trained_here(
        self, name: str, steps: int, keeps_ema: bool, aux_names: tuple[str, ...]
    ) -> Weights:
        """Inside of a stage: the weights that it ends with."""
        return Weights(name, self.state.current, steps, keeps_ema, aux_names)

    def load(self, weights: Weights) -> PhaseResult:
        """Reads the arrays of weights: what is trained, and what goes on from phase to phase."""
        model = self.workspace.model
        if weights.name == BASE:
            return PhaseResult(model.init_trainable(self.key("adapters")))
        params = model.abstract_trainable()
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(model.mesh))
        aux_state = dict.fromkeys(weights.aux_names, number)
        abstract = PhaseResult(params, params if weights.keeps_ema else None, aux_state)
        return self.checkpoints.load_phase(weights.name, abstract)

    def params(self, weights: Weights) -> Params:
        """The parameters that samplers and scorers take."""
        return self.workspace.model.assemble(self.state.weights.get(weights).params)

    def drop_weights_before(self, iteration: int, keep: int) -> None:
        """Drops the checkpoints of earlier iterations, but for the one to keep."""
        for old in range(1, iteration):
            if old != keep:
                self.checkpoints.drop_phase(iteration_name(old))

    # ---- seeds, files, ends

    def key(self, *names: str | int) -> Array:
        """A PRNG key addressed by the run's seed and these names."""
        return derive_key(self.config.seed, *names)

    def write_json(self, name: str, value: object) -> None:
        """Writes a JSON file at this place."""
        atomic_write_text(self.path(name), to_json(value))

    def compilations_since_last(self) -> int:
        """Programs that this process compiled since the last call for this run."""
        before, self.state.compilations = self.state.compilations, compilation_count()
        return self.state.compilations - before

    def stop_if_preempted(self) -> None:
        """Raises Preempted where the process was asked to stop; what is done so far is saved."""
        if self.preemption.preempted:
            self.ledger.save()
            where = f" in stage {self.ledger.stage}" if self.ledger.stage else ""
            raise Preempted(f"stopped on request{where}; {self.resume_hint()}")

    def resume_hint(self) -> str:
        return f"run the same command again to go on (run folder: {self.folder})"


def iteration_name(number: int) -> str:
    """The checkpoint of an iteration or round, counted from 1."""
    return f"iteration-{number:02d}"


def _keep_config(folder: Path, config: RunConfig) -> None:
    """Writes config.json; raises UserError where the folder has that of another config."""
    path, new = folder / "config.json", config_json(config)
    if not path.exists():
        atomic_write_text(path, to_json(new))
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not JSON; choose another --workdir") from None
    if isinstance(there, dict) and "baseline" in there:  # It was killed before its first stage.
        raise UserError(
            f"{path}: this run folder has the layout of another version of cipo_jax; go on with "
            "that version, or choose another --workdir"
        )
    old, new = flatten(there), flatten(new)
    differ = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    if differ:
        shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in differ[:5])
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise UserError(
            f"{path}: this folder holds a run with another config ({shown}{more}); "
            "choose another --workdir, or the config it was made with"
        )


def config_json(config: RunConfig) -> Mapping[str, Json]:
    """A config as JSON has it: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
