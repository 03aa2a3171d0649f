"""CiPO: counterfactual unlearning through iterative preference optimisation (arXiv 2604.15847).

`unlearn` reads like the paper's algorithm. Each call in it is a stage of the run folder: it happens
once, whole, and a run that is killed anywhere goes on where it was.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax.monitoring

from cipo_jax.config import TrainConfig
from cipo_jax.data.batches import Encoded, shape_of
from cipo_jax.evals.evaluate import Scores
from cipo_jax.evals.fluency import fact_tokens, nonfact_logp
from cipo_jax.evals.leakage import share
from cipo_jax.models import lora as adapters
from cipo_jax.models.decoder import merged
from cipo_jax.models.reasoning_model import ReasoningModel
from cipo_jax.training.loop import run_phase
from cipo_jax.training.optimizer import make_optimizer
from cipo_jax.training.step import Objective, Policy, Trainer
from cipo_jax.typing import Params
from cipo_jax.unlearning import preferences
from cipo_jax.unlearning.counterfactuals import make_counterfactuals
from cipo_jax.unlearning.engine import Engine
from cipo_jax.unlearning.objectives import preference_objective, warmup_objective
from cipo_jax.unlearning.run_folder import Row

Weights = dict[str, Params]  # {"params"} and, where the reference is a moving average, {"ema"}.


def unlearn(engine: Engine) -> Row:
    """Runs CiPO, or goes on with it; returns what it came to.

    Returns:
      {"before", "after": scores, "retrained": scores or None, "iterations": records, "best": the
      chosen iteration, "fluency": mean log-probability of non-fact tokens before and after}.
    """
    run = _Run(engine)
    before = run.evaluate("before", "start")
    counterfactuals = run.counterfactuals()
    run.warmup(counterfactuals)
    records: list[Row] = []
    for iteration in range(1, engine.config.cipo.iterations + 1):
        run.rollouts(counterfactuals, iteration)
        run.pairs(counterfactuals, iteration)
        run.optimise(iteration)
        records.append(run.validate(iteration))
        run.keep_only(best_of(records), iteration)
        if clean_rounds(records) >= engine.config.cipo.patience:
            break
    best = best_of(records)["iteration"]
    after = run.evaluate("after", _iteration(best))
    retrained = run.evaluate_retrained()
    fluency = run.fluency()
    run.export(_iteration(best))
    return {
        "before": before,
        "after": after,
        "retrained": retrained,
        "iterations": records,
        "best": best,
        "fluency": fluency,
    }


def best_of(records: list[Row]) -> Row:
    """The iteration to keep, by validation scores alone.

    Among the iterations whose leak (the larger of CoT and answer) is at most cipo.leak_goal, the
    one of highest utility; if there is none, the one of least leak. The later one wins a tie.
    """

    def rank(record: Row) -> tuple[bool, float, int]:
        merit = record["utility"] if record["clean"] else -record["leak"]
        return record["clean"], merit, record["iteration"]

    return max(records, key=rank)


def clean_rounds(records: list[Row]) -> int:
    """How many of the last rounds in a row leaked nothing in validation."""
    count = 0
    for record in reversed(records):
        if not record["clean"]:
            break
        count += 1
    return count


def utility(scores: Scores) -> float:
    """Harmonic mean of retain accuracy, reasoning accuracy (if there are any), think-completion."""
    parts = [scores["forget"]["think_completion"]]
    parts += [scores[s]["accuracy"] for s in ("retain", "reasoning") if scores[s]["n"]]
    return len(parts) / sum(1.0 / p for p in parts) if all(parts) else 0.0


def _iteration(number: int) -> str:
    return f"iteration-{number:02d}"


def training_policy(engine: Engine) -> Policy:
    """The scorer's policy, with the adapters' dropout."""
    policy = engine.scorer.policy
    dropout = engine.lora.dropout if engine.lora else 0.0
    compute = dataclasses.replace(policy.compute, lora_dropout=dropout)
    return dataclasses.replace(policy, compute=compute)


def export(engine: Engine, trained: Params, form: str, folder: Path) -> None:
    """Writes what is trained as a Hugging Face folder ("export"), or in PEFT's form ("adapter")."""
    if form == "adapter":
        assert engine.lora is not None
        base = engine.config.model.path
        adapters.save_adapters(folder, engine.model.config, engine.lora, trained, base)
        return
    params = merged(engine.assemble(trained))
    engine.model.save(folder, params, engine.config.model.export_dtype)


class _CompilationCount:
    """Counts the programs that XLA compiles in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        del duration_secs, kwargs
        self.count += event == "/jax/core/compile/backend_compile_duration"


class _Run:
    """The stages of one CiPO run. Holds the weights of the phase it is at, and no others."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._name, self._weights = "", {}
        self._compilations = _CompilationCount()
        self._last_count = 0

    # Weights, by the name of the phase that ended with them.

    def weights(self, name: str) -> Weights:
        """The weights that a phase ended with; "start" is the model that came in."""
        if name != self._name:
            self._weights = {}  # Let go of the old ones before the new ones arrive.
            self._weights, self._name = self._load(name), name
        return self._weights

    def model(self, name: str) -> Params:
        """The model that a phase ended with, as the sampler and the scorer take it."""
        return self.engine.assemble(self.weights(name)["params"])

    def _load(self, name: str) -> Weights:
        if name == "start":
            return {"params": self.engine.start()}
        params = self.engine.abstract_trained()
        abstract = {"params": params}
        if self._keeps_ema and name != "warmup":
            abstract["ema"] = params
        return self.engine.checkpoints.load_phase(name, abstract)

    @property
    def _keeps_ema(self) -> bool:
        settings = self.engine.config.cipo
        return settings.reference == "ema" and settings.loss != "simpo"

    def keep_only(self, best: Row, iteration: int) -> None:
        """Drops the weights of iterations that can no longer be needed."""
        for old in range(1, iteration):
            if old != best["iteration"]:
                self.engine.checkpoints.drop_phase(_iteration(old))

    # Stages.

    def evaluate(self, name: str, phase: str) -> Scores:
        """Scores of a phase's model on the evaluation splits; evals/NAME.jsonl."""
        engine, splits = self.engine, self.engine.splits

        def make() -> Row:
            rows, scores = engine.evaluate(
                name,
                f"evaluation {name}",
                self.model(phase),
                splits.for_evaluation(),
            )
            engine.folder.write_rows(f"evals/{name}.jsonl", rows)
            return {"scores": scores}

        return engine.folder.once(name, make, [f"evals/{name}.jsonl"])["scores"]

    def counterfactuals(self) -> list[Row]:
        """counterfactuals.jsonl: the model's own traces to other answers."""
        folder = self.engine.folder

        def make() -> Row:
            rows = make_counterfactuals(self.engine, self.model("start"))
            folder.write_rows("counterfactuals.jsonl", rows)
            without = [row["question"] for row in rows if not row["accepted"]]
            drawn = sum(row["accepted"] + len(row["rejected"]) for row in rows)
            return {"questions": len(rows), "candidates": drawn, "without_trace": without}

        result = folder.once("counterfactuals", make, ["counterfactuals.jsonl"])
        found = result["questions"] - len(result["without_trace"])
        self.engine.reporter.line(
            f"counterfactuals: {found} of {result['questions']} questions have a valid trace "
            f"({result['candidates']} candidates)"
        )
        for question in result["without_trace"]:
            self.engine.reporter.line(f"  none for: {question}")
        return folder.read_rows("counterfactuals.jsonl")

    def warmup(self, counterfactuals: list[Row]) -> None:
        """Supervised warm-up on the counterfactuals."""

        def make() -> Row:
            batch_at, steps = preferences.warmup_batches(self.engine, counterfactuals)
            trainer, update = self._warmup_trainer(steps)
            self._optimise("warmup", "start", trainer, update, batch_at, steps, 0)
            return {"steps": steps}

        self.engine.folder.once("warmup", make)

    def rollouts(self, counterfactuals: list[Row], iteration: int) -> None:
        """rollouts.jsonl: what the current model says to the forget questions."""
        file = f"iterations/{iteration:02d}/rollouts.jsonl"

        def make() -> Row:
            params = self.model(self._before(iteration))
            rows = preferences.draw_rollouts(self.engine, params, counterfactuals, iteration)
            self.engine.folder.write_rows(file, rows)
            return {
                "cot_leak": share([bool(r["cot_leaks"]) for r in rows]),
                "answer_leak": share([bool(r["answer_leaks"]) for r in rows]),
                "think_completion": share([r["closed"] for r in rows]),
                "n": len(rows),
            }

        self.engine.folder.once(f"{_iteration(iteration)}/rollouts", make, [file])

    def pairs(self, counterfactuals: list[Row], iteration: int) -> None:
        """pairs.jsonl: counterfactual against rollout, with the reference's log-probabilities."""
        file, settings = f"iterations/{iteration:02d}/pairs.jsonl", self.engine.config.cipo

        def make() -> None:
            rollouts = self.engine.folder.read_rows(f"iterations/{iteration:02d}/rollouts.jsonl")
            pairs = preferences.make_pairs(counterfactuals, rollouts, settings.reject)
            if settings.loss != "simpo":
                fixed = {"base": "start", "initial": "warmup"}
                phase = fixed.get(settings.reference, self._before(iteration))
                weights = self.weights(phase)
                params = self.engine.assemble(weights.get("ema", weights["params"]))
                pairs = preferences.with_reference_logps(self.engine, params, pairs, phase)
            self.engine.folder.write_rows(file, pairs)

        self.engine.folder.once(f"{_iteration(iteration)}/pairs", make, [file])

    def optimise(self, iteration: int) -> None:
        """Preference optimisation on the pairs of this iteration."""

        def make() -> Row:
            pairs = self.engine.folder.read_rows(f"iterations/{iteration:02d}/pairs.jsonl")
            batch_at, steps = preferences.pair_batches(self.engine, pairs, iteration)
            trainer, update = self._preference_trainer(steps)
            name, start = _iteration(iteration), self._before(iteration)
            self._optimise(name, start, trainer, update, batch_at, steps, iteration)
            return {"steps": steps}

        self.engine.folder.once(f"{_iteration(iteration)}/optimise", make)

    def validate(self, iteration: int) -> Row:
        """Scores on the validation splits, which early stop and best checkpoint go by."""
        engine, splits = self.engine, self.engine.splits
        file = f"iterations/{iteration:02d}/metrics.json"

        def make() -> Row:
            rows, scores = engine.evaluate(
                f"{_iteration(iteration)}/validate",
                f"iteration {iteration}: validation",
                self.model(_iteration(iteration)),
                splits.for_validation(),
            )
            del rows
            leak = max(scores["forget"]["cot_leak"], scores["forget"]["answer_leak"])
            record = {
                "iteration": iteration,
                "leak": leak,
                "clean": leak <= engine.config.cipo.leak_goal,
                "utility": utility(scores),
                "validation": scores,
                "rollouts": engine.folder.result(f"{_iteration(iteration)}/rollouts"),
            }
            engine.folder.write_json(
                file, record | {"compilations": self._compilations_since_last()}
            )
            return record

        record = engine.folder.once(f"{_iteration(iteration)}/validate", make, [file])
        forget = record["validation"]["forget"]
        engine.reporter.line(
            f"iteration {iteration}: validation leak {forget['cot_leak']:.1%} in CoT, "
            f"{forget['answer_leak']:.1%} in answers; retain "
            f"{record['validation']['retain']['accuracy']:.1%}, reasoning "
            f"{record['validation']['reasoning']['accuracy']:.1%}"
        )
        return record

    def evaluate_retrained(self) -> Scores | None:
        """Scores of the gold standard, where there is one for this very forget set."""
        engine, splits = self.engine, self.engine.splits
        path = engine.config.model.retrained
        if not path:
            return None
        retrained = ReasoningModel.open(path, engine.config.think)
        never_saw = retrained.never_saw()
        if never_saw is not None and set(never_saw) != splits.forgotten_people:
            engine.reporter.line(
                "no retrained column: the retrained model that ships never saw another forget set"
            )
            return None

        def make() -> Row:
            rows, scores = engine.evaluate(
                "retrained",
                "evaluation retrained",
                engine.load_model(retrained),
                splits.for_evaluation(),
                retrained,
            )
            engine.folder.write_rows("evals/retrained.jsonl", rows)
            return {"scores": scores}

        return engine.folder.once("retrained", make, ["evals/retrained.jsonl"])["scores"]

    def fluency(self) -> dict[str, float]:
        """Mean log-probability, under the model before, of what is said before and after."""
        engine = self.engine

        def make() -> Row:
            params = self.model("start")
            result = {}
            for name in ("before", "after"):
                said = [
                    r for r in engine.folder.read_rows(f"evals/{name}.jsonl")
                    if r["split"] == "forget"
                ]  # fmt: skip
                rows = [
                    Encoded(engine.model.format.prompt_ids(r["question"]), r["ids"]) for r in said
                ]
                facts = [
                    fact_tokens(engine.model.format.tokenizer, r["ids"], engine.splits.fact_words)
                    for r in said
                ]
                result[name] = nonfact_logp(
                    engine.scorer.token_logps(params, rows, shape_of(rows)), facts
                )
            return result

        return engine.folder.once("fluency", make)

    def export(self, phase: str) -> None:
        """export/: the unlearned model as a Hugging Face folder; adapter/: its adapters, if any."""
        folder, outputs = self.engine.folder, ["export"]
        if self.engine.lora:
            outputs.append("adapter")

        def make() -> None:
            for output in outputs:
                export(self.engine, self.weights(phase)["params"], output, folder.path / output)

        folder.once("export", make, outputs)

    # Training.

    @staticmethod
    def _before(iteration: int) -> str:
        return "warmup" if iteration == 1 else _iteration(iteration - 1)

    def _trainer(
        self, settings: TrainConfig, objective: Objective, steps: int, ema: bool
    ) -> tuple[Trainer, Any]:
        trainer = Trainer(
            training_policy(self.engine),
            objective,
            make_optimizer(settings, steps),
            self.engine.mesh,
            settings.accumulation,
            self.engine.config.cipo.ema_decay if ema else None,
            self.engine.lora,
            self.engine.config.seed,
        )
        return trainer, trainer.make_update()

    @functools.cache  # noqa: B019  (one run a process; keeps the compiled update)
    def _preference_trainer(self, steps: int) -> tuple[Trainer, Any]:
        objective = preference_objective(self.engine.config.cipo)
        return self._trainer(self.engine.config.train, objective, steps, self._keeps_ema)

    def _warmup_trainer(self, steps: int) -> tuple[Trainer, Any]:
        objective = warmup_objective(self.engine.config.cipo)
        return self._trainer(self.engine.config.warmup, objective, steps, False)

    def _optimise(
        self,
        name: str,
        start: str,
        trainer: Trainer,
        update: Any,
        batch_at: Any,
        steps: int,
        phase: int,
    ) -> None:
        engine = self.engine
        if engine.checkpoints.has_phase(name):  # Killed between the checkpoint and its entry.
            return
        done = engine.checkpoints.latest_step(name) or 0
        earlier = ["warmup", *(f"{_iteration(i)}/optimise" for i in range(1, phase))]
        before = sum(engine.folder.result(stage)["steps"] for stage in earlier) if phase else 0
        engine.log.rewind(before + done)
        tokens = _tokens(batch_at(0)) if steps else 0
        title = "warm-up" if name == "warmup" else f"iteration {phase}: {engine.config.cipo.loss}"
        settings = engine.config.warmup if name == "warmup" else engine.config.train
        with engine.reporter.bar(title, steps) as bar:
            bar.skip(done)

            def on_step(step: int, metrics: dict[str, float]) -> None:
                engine.log.write(before + step, name, metrics)
                bar.advance(1, tokens, f"loss {metrics['loss']:.3f}")

            weights = run_phase(
                name,
                trainer,
                update,
                dict(self.weights(start)),
                batch_at,
                steps,
                engine.checkpoints,
                settings.checkpoint_every,
                on_step,
                engine.folder.saved,
                lambda: engine.folder.stop_asked,
                engine.frozen,
            )
        if weights is None:
            engine.folder.stop_if_asked()
            raise AssertionError("a phase ends early only when it is asked to")
        engine.checkpoints.save_phase(name, weights)
        self._weights, self._name = weights, name

    def _compilations_since_last(self) -> int:
        count, self._last_count = (
            self._compilations.count - self._last_count,
            (self._compilations.count),
        )
        return count


def _tokens(batch: Any) -> int:
    """Real completion tokens of a batch, roughly the same in each."""
    groups = [g for g in batch.values() if hasattr(g, "lengths")]
    return int(sum(math.fsum(g.lengths.reshape(-1)) for g in groups))
