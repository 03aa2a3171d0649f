"""Methods side by side: the same data, the same budget to be tuned, several seeds, one table.

Every trial is a run of its own in a folder of its own, so that a comparison that is stopped
anywhere goes on where it was. The learning rate is chosen with seed 0, by validation, among the
same candidates for every method; the round, by validation, in every trial.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cipo_jax.config import CompareConfig, Config, flatten, parse
from cipo_jax.data.batches import TokenizedExample
from cipo_jax.errors import UserError
from cipo_jax.evals.distance import divergence, forget_quality, truth_ratios
from cipo_jax.evals.leakage import share
from cipo_jax.models.reasoning_model import ReasoningModel
from cipo_jax.progress import Reporter
from cipo_jax.training.loop import Diverged
from cipo_jax.typing import Params
from cipo_jax.unlearning import methods
from cipo_jax.unlearning.engine import Engine
from cipo_jax.unlearning.materials import Materials
from cipo_jax.unlearning.run import Run, best_of, iteration_name
from cipo_jax.unlearning.run_folder import Row, peak_memory_bytes, restart_peak_memory
from cipo_jax.unlearning.start import run_of
from cipo_jax.unlearning.workers import run_workers

# What is reported of a model, in this order: key, heading, whether more is better (None: neither).
MEASURES: tuple[tuple[str, str, bool | None], ...] = (
    ("cot_leak", "CoT leak %", False),
    ("answer_leak", "answer leak %", False),
    ("zero_leak", "ZeroThink leak %", False),
    ("less_leak", "LessThink leak %", False),
    ("think_completion", "think-completion %", True),
    ("retain", "retain %", True),
    ("reasoning", "reasoning %", True),
    ("ks", "KS p", True),
    ("kl", "KL nats", False),
    ("steps", "steps", None),
    ("seconds", "s", None),
    ("peak_gib", "GiB", None),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table: a method, or CiPO with other settings.

    Attributes:
      name: of the row.
      method: of the registry.
      changes: {"group.key": value} to the config.
    """

    name: str
    method: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name as one of a folder."""
        return "".join(c if c.isalnum() else "_" for c in self.name)

    def config(self, config: Config) -> Config:
        """The comparison's config with this entry's changes."""
        changed = dataclasses.replace(config, method=self.method)
        for key, value in self.changes.items():
            changed = _with(changed, key, value)
        return methods.configured(changed)


def _with(config: Config, key: str, value: Any) -> Config:
    """The config with one setting "group.key" changed; raises UserError where there is none."""
    group, _, name = key.partition(".")
    values: Any = dataclasses.asdict(config)
    if key not in flatten(values):
        raise UserError(f"config.compare: {key!r} is no setting of the config")
    if isinstance(value, str):
        old = values[group][name] if name else values[group]
        if not isinstance(old, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise UserError(f"config.compare: {key}={value}: must be like {old!r}") from None
    if name:
        values[group][name] = value
    else:
        values[group] = value
    return parse(Config, values)


# What rows may differ in; materials and the gold standard are those of the whole comparison.
_GROUPS = {"baseline", "cipo", "counterfactual", "lora", "train", "warmup"}


def entries_of(config: Config) -> list[Entry]:
    """The rows that a config asks for.

    Raises:
      UserError: for a method that there is not, or a variant that cannot be read.
    """
    methods.import_plugins(config)
    if config.compare.variants:
        entries = [_variant(line) for line in config.compare.variants.splitlines() if line.strip()]
    elif config.compare.methods == "all":
        entries = [Entry(name, name) for name in methods.METHODS]
    else:
        names = [n.strip() for n in config.compare.methods.split(",") if n.strip()]
        entries = [Entry(methods.find(name).name, name) for name in names]
    if len({entry.folder for entry in entries}) < len(entries):
        raise UserError("config.compare: two rows have the same name")
    for line in config.compare.own.splitlines():
        if line.strip():
            names, changes = _changes(line, "own", "row, row")
            rows = [_row_name(name, entries, "own") for name in names.split(",")]
            entries = [
                dataclasses.replace(e, changes={**changes, **e.changes}) if e.name in rows else e
                for e in entries
            ]
    for entry in entries:
        entry.config(config)
        for key in entry.changes:
            if key.partition(".")[0] not in _GROUPS:
                raise UserError(
                    f"config.compare: row {entry.name!r} cannot change {key!r}: rows share model, "
                    f"data and seeds, and differ in {', '.join(sorted(_GROUPS))}"
                )
    return entries


def rates_of(config: Config, entries: Sequence[Entry]) -> dict[str, list[float]]:
    """The learning rates that each row is to try, by its name.

    Raises:
      UserError: where config.compare.lrs cannot be read, or names a row that there is not.
    """
    common, *others = config.compare.lrs.split(";")
    rates = {e.name: _rates(common) or [e.config(config).train.lr] for e in entries}
    for clause in others:
        names, _, lrs = clause.partition(":")
        if not _rates(lrs):
            raise UserError(
                f"config.compare.lrs: {clause.strip()!r} is not of the form 'row, row: 1e-3, 1e-2'"
            )
        for name in names.split(","):
            rates[_row_name(name, entries, "lrs")] = _rates(lrs)
    for entry in entries:
        if "train.lr" in entry.changes and config.compare.lrs:
            raise UserError(
                f"config.compare: row {entry.name!r} sets train.lr; its rates go into "
                f"config.compare.lrs: '; {entry.name}: ...'"
            )
    return {entry.name: rates[entry.name] for entry in entries}


def _row_name(text: str, entries: Sequence[Entry], key: str) -> str:
    """The name of a row, or of a method that has none this time."""
    name, rows = text.strip(), [entry.name for entry in entries]
    if name not in rows and name not in methods.METHODS:
        raise UserError(f"config.compare.{key}: no row {name!r}; rows: {', '.join(rows)}")
    return name


def _rates(text: str) -> list[float]:
    try:
        found = [float(piece) for piece in text.split(",") if piece.strip()]
    except ValueError:
        found = [math.nan]
    if not all(0.0 < lr < math.inf for lr in found):
        raise UserError(
            f"config.compare.lrs: {text.strip()!r}: must be numbers above 0, comma-separated"
        )
    return found


def _variant(line: str) -> Entry:
    name, changes = _changes(line, "variants", "name")
    return Entry(name, changes.pop("method", "cipo"), changes)


def _changes(line: str, key: str, form: str) -> tuple[str, dict[str, str]]:
    """What stands before the colon, and the settings after it."""
    name, colon, rest = line.partition(":")
    pairs = [pair.split("=", 1) for pair in rest.split(",") if pair.strip()]
    if not colon or any(len(pair) != 2 for pair in pairs):
        raise UserError(
            f"config.compare.{key}: {line.strip()!r} is not of the form '{form}: key=value, "
            "key=value'"
        )
    return name.strip(), {key.strip(): value.strip() for key, value in pairs}


class Comparison:
    """All trials of a comparison, and what they share."""

    def __init__(self, config: Config, workdir: str, reporter: Reporter, claim: bool = True):
        """Opens the folder; trains nothing yet.

        Args:
          config: every setting.
          workdir: the run folder.
          reporter: the terminal.
          claim: whether no other process may be at work in the folder.
        """
        self.entries, self._settings, self._config = entries_of(config), config.compare, config
        self._rates = rates_of(config, self.entries)
        # A trial does not depend on which others there are: more methods, seeds or rates may be
        # asked for later, in the same folder.
        plain = dataclasses.replace(config, method="cipo", compare=CompareConfig())
        self.engine = Engine.open(plain, workdir, reporter, claim=claim)
        for entry in self.entries:  # Before anything is trained.
            asked = entry.config(plain)
            methods.check(asked, self.engine.model.config)
            methods.part_of(asked, self.engine.model.config)
        self.engine.folder.listen()
        self._quiet = Reporter(quiet=True)
        self._materials: dict[str, Materials] = {}
        self._retrained: Params = None
        self._gold: tuple[np.ndarray, list[TokenizedExample]] | None = None

    def run(self) -> Row:
        """Everything; returns what comparison.json holds."""
        folder = self.engine.folder
        retrained = self._measure_retrained()  # First, since distances are measured from it.
        before = folder.once("before", lambda: self._measure(self.engine, self._start()))
        if self._settings.workers > 1:
            run_workers(self._config, folder, self._settings.workers, self.engine.reporter.line)
        rows = []
        for entry in self.entries:
            if methods.find(entry.method).loop == "none":
                if retrained is not None:
                    rows.append(self._row(entry, [retrained], None, []))
                continue
            lr, tried, finals = self._trials(entry)
            whole = [final for final in finals if final is not None]
            rows.append(self._row(entry, whole, lr, tried))
            rows[-1]["diverged"] = len(finals) - len(whole)
            self._tell(rows[-1])
        result = {
            "before": before,
            "retrained": retrained,
            "rows": rows,
            "n": {k: len(v) for k, v in self.engine.splits.for_evaluation().items()},
            "budget": {
                "lrs": {entry.name: self._rates[entry.name] for entry in self.entries},
                "seeds": self._settings.seeds,
            },
            "seconds": sum(self._all_seconds()),
        }
        folder.write_json("comparison.json", result)
        return result

    def work(self) -> None:
        """The trials of every row that no other process is at, for processes side by side."""
        self._measure_retrained()
        with contextlib.ExitStack() as claims:
            for entry in self.entries:
                if methods.find(entry.method).loop != "none" and self._claim(entry, claims):
                    self._trials(entry)

    def _claim(self, entry: Entry, claims: contextlib.ExitStack) -> bool:
        """Takes a row for this process, until it ends; False where another has it."""
        folder = self.engine.folder.path / "runs" / entry.folder
        folder.mkdir(parents=True, exist_ok=True)
        file = claims.enter_context((folder / ".lock").open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise UserError(
                f"{file.name}: cannot be locked here ({error.strerror}); use one process: "
                "--config.compare.workers=1"
            ) from None
        return True

    # ---- trials

    def _trials(self, entry: Entry) -> tuple[float, list[Row], list[Row | None]]:
        """A row's learning rate, what each of them came to, and the scores with every seed."""
        lr, tried = self._tuned(entry)
        return lr, tried, [self._final(entry, lr, seed) for seed in range(self._settings.seeds)]

    def _tuned(self, entry: Entry) -> tuple[float, list[Row]]:
        """The learning rate to take, and what each came to in validation."""
        lrs, tried = self._rates[entry.name], []
        if len(lrs) == 1:
            return lrs[0], []
        for lr in lrs:
            record = self._trial(entry, lr, 0)[1]
            tried.append({"lr": lr} | record)
        # As rounds are chosen: least leak first, then utility; of equals the first that is listed.
        best = best_of([t | {"iteration": -i} for i, t in enumerate(tried)])
        for t in tried:
            if t["lr"] != best["lr"]:
                self._clear(entry, t["lr"], 0)
        return best["lr"], tried

    def _folder(self, entry: Entry, lr: float, seed: int) -> Path:
        return self.engine.folder.path / "runs" / entry.folder / f"lr-{lr:g}-seed-{seed}"

    def _trial(self, entry: Entry, lr: float, seed: int) -> tuple[Run, Row]:
        """Runs a method once, or goes on with it.

        Returns:
          The run, and the record of its best round; one with "diverged" where the loss stopped
          being a number in the first.
        """
        config = entry.config(self.engine.config)
        train = dataclasses.replace(config.train, lr=lr)
        config = dataclasses.replace(config, seed=seed, train=train)
        engine = self.engine.child(config, self._folder(entry, lr, seed), self._quiet)
        engine.folder.listen()
        run = run_of(engine, self._shared(config))
        restart_peak_memory()
        try:
            records = [] if "diverged" in engine.folder.stages else run.rounds()
        except Diverged as error:
            records, said = [], str(error)
            engine.folder.once("diverged", lambda: {"said": said})
            self.engine.reporter.line(f"{entry.name:<24} lr {lr:<8g} seed {seed}  {error}")
        finally:
            engine.log.close()
        if not records:  # What was validated before the loss stopped being a number counts.
            stages = engine.folder.stages.items()
            records = [v["result"] for k, v in stages if k.endswith("/validate")]
        if not records:
            return run, {"diverged": True, "clean": False, "leak": 1.0, "utility": 0.0}

        def tell() -> Row:
            return {"peak_bytes": peak_memory_bytes()}

        known = "memory" in engine.folder.stages
        engine.folder.once("memory", tell)
        best = best_of(records)
        if not known:
            self.engine.reporter.line(
                f"{entry.name:<24} lr {lr:<8g} seed {seed}  round {best['iteration']} of "
                f"{len(records)}  leak {best['leak']:.1%}  utility {best['utility']:.3f}"
            )
        return run, {k: best[k] for k in ("iteration", "leak", "clean", "utility")}

    def _final(self, entry: Entry, lr: float, seed: int) -> Row | None:
        """What a trial's best round comes to on the evaluation splits; None where it diverged."""
        run, record = self._trial(entry, lr, seed)
        if "diverged" in record:
            return None
        engine, keeps = run.engine, self._settings.keep_models
        phase = iteration_name(record["iteration"])
        wanted = ["scores", "export"] if keeps else ["scores"]
        if not engine.checkpoints.has_phase(phase) and not engine.folder.stages.keys() >= {*wanted}:
            # The weights were dropped when nobody seemed to need them: train it again.
            shutil.rmtree(engine.folder.path)
            return self._final(entry, lr, seed)

        def make() -> Row:
            steps = [v["result"].get("steps", 0) for v in engine.folder.stages.values()]
            measured = self._measure(engine, run.model(phase))
            seconds = {
                k: v
                for k, v in engine.folder.seconds().items()
                if k.rsplit("/", 1)[-1] in ("warmup", "rollouts", "pairs", "optimize")
            }
            made = self._shared(engine.config).seconds(methods.find(entry.method))
            return measured | {
                "steps": sum(steps),
                "seconds": sum(seconds.values()) + made,
                "peak_gib": engine.folder.result("memory")["peak_bytes"] / 2**30,
                "round": record["iteration"],
            }

        final = engine.folder.once("scores", make)
        if keeps:
            run.export(phase)
        else:
            self._clear(entry, lr, seed)
        return final

    def _clear(self, entry: Entry, lr: float, seed: int) -> None:
        """Drops a trial's weights, which nobody needs any more."""
        if not self._settings.keep_models:
            shutil.rmtree(self._folder(entry, lr, seed) / "checkpoints", ignore_errors=True)

    def _shared(self, config: Config) -> Materials:
        """What trials of this seed learn from, made once for all of them."""
        plain = dataclasses.replace(
            self.engine.config,
            seed=config.seed,
            counterfactual=config.counterfactual,
            baseline=config.baseline,
        )
        parts = [dataclasses.asdict(p) for p in (config.counterfactual, config.baseline)]
        text = json.dumps([config.seed, *parts], sort_keys=True)
        name = f"seed-{config.seed}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
        if name not in self._materials:
            path = self.engine.folder.path / "materials" / name

            def apart(stage: str) -> Engine:
                engine = self.engine.child(plain, path / stage, self._quiet)
                engine.folder.listen()
                return engine

            self._materials[name] = Materials(apart, self._start)
        return self._materials[name]

    def _start(self) -> Params:
        return self.engine.assemble(self.engine.start())

    # ---- measures

    def _measure(self, engine: Engine, params: Params, model: ReasoningModel | None = None) -> Row:
        """What is reported of a model."""
        splits = engine.splits.for_evaluation()
        rows, scores = engine.evaluate("scores/think", "evaluation", params, splits, model)
        engine.folder.write_rows("evals/think.jsonl", rows)
        measured = {
            "cot_leak": scores["forget"]["cot_leak"],
            "answer_leak": scores["forget"]["answer_leak"],
            "think_completion": scores["forget"]["think_completion"],
            "retain": scores["retain"]["accuracy"],
            "reasoning": scores["reasoning"]["accuracy"],
        }
        asked = {"forget": splits["forget"]}
        for attack in ("zero", "less"):
            rows, _ = engine.evaluate(
                f"scores/{attack}", f"{attack.capitalize()}Think", params, asked, model, attack
            )
            engine.folder.write_rows(f"evals/{attack}.jsonl", rows)
            leaks = [bool(r["cot_leaks"] or r["answer_leaks"]) for r in rows]
            measured[f"{attack}_leak"] = share(leaks)
        if self._gold is not None and model is None:
            ratios, said = self._gold
            own = truth_ratios(engine.scorer, params, engine.model.format, splits["forget"])
            measured["ks"] = forget_quality(own, ratios)
            measured["kl"] = divergence(engine.scorer, params, self._retrained, said)
        return measured

    def _measure_retrained(self) -> Row | None:
        """The gold standard, where there is one for this very forget set."""
        engine = self.engine
        model = Run(engine).gold_standard()
        if model is None:
            return None
        self._retrained = engine.load_model(model)
        asked = engine.splits.forget_eval
        scored = engine.folder.once(
            "retrained", lambda: self._measure_gold(model), ["retrained.json"]
        )
        gold = engine.folder.read_json("retrained.json")
        encode = engine.model.format.prompt_ids
        said = [
            TokenizedExample(encode(e.question), ids)
            for e, ids in zip(asked, gold["said"], strict=True)
        ]
        self._gold = np.array(gold["ratios"]), said
        return scored

    def _measure_gold(self, model: ReasoningModel) -> Row:
        engine = self.engine
        measured = self._measure(engine, self._retrained, model)
        rows = engine.folder.read_rows("evals/think.jsonl")
        asked = engine.splits.forget_eval
        ratios = truth_ratios(engine.scorer, self._retrained, engine.model.format, asked)
        said = [row["ids"] for row in rows if row["split"] == "forget"]
        engine.folder.write_json("retrained.json", {"ratios": ratios.tolist(), "said": said})
        return measured

    # ---- what comes of it

    def _row(self, entry: Entry, finals: list[Row], lr: float | None, tried: list[Row]) -> Row:
        values = {}
        for key, _, _ in MEASURES:
            found = [final[key] for final in finals if key in final]
            if found:
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                values[key] = {"mean": statistics.mean(found), "std": spread, "values": found}
        return {
            "name": entry.name,
            "method": entry.method,
            "about": methods.find(entry.method).about,
            "changes": dict(entry.changes),
            "lr": lr,
            "tried": tried,
            "measures": values,
        }

    def _tell(self, row: Row) -> None:
        m = row["measures"]
        if not m:
            self.engine.reporter.line(f"{row['name']:<24} diverged with every seed")
            return
        self.engine.reporter.line(
            f"{row['name']:<24} leak {m['cot_leak']['mean']:.1%} CoT, "
            f"{m['answer_leak']['mean']:.1%} answer; retain {m['retain']['mean']:.1%}, reasoning "
            f"{m['reasoning']['mean']:.1%}"
        )

    def _all_seconds(self) -> list[float]:
        """Seconds of every stage of every run under the folder."""
        found = []
        for path in sorted(self.engine.folder.path.glob("**/stages.json")):
            state = json.loads(path.read_text(encoding="utf-8"))
            found += [stage["seconds"] for stage in state["stages"].values()]
        return found
