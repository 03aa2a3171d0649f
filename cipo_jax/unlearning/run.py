"""What the run of every method has in common: weights by phase, stages, rounds and their choice."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.monitoring

from cipo_jax.config import TrainConfig
from cipo_jax.data.batches import TokenizedExample, shape_of
from cipo_jax.evals.evaluate import Scores
from cipo_jax.evals.fluency import fact_tokens, nonfact_logp
from cipo_jax.models import lora as adapters
from cipo_jax.models.decoder import merged
from cipo_jax.models.lora import Lora
from cipo_jax.models.reasoning_model import ReasoningModel
from cipo_jax.training.loop import run_phase
from cipo_jax.training.optimizer import make_optimizer
from cipo_jax.training.step import Batch, Carried, Objective, Policy, Trainer
from cipo_jax.typing import Params
from cipo_jax.unlearning.engine import Engine
from cipo_jax.unlearning.materials import Materials
from cipo_jax.unlearning.run_folder import Row

Weights = dict[str, Params]  # {"params"} and, where the reference is a moving average, {"ema"}.


def best_of(records: list[Row]) -> Row:
    """The iteration to keep, by validation scores alone.

    Among the iterations whose leak (the larger of CoT and answer) is at most cipo.leak_goal, the
    one of highest harmonic mean of utility and 1 - leak; if there is none, the one of least leak.
    The later one wins a tie.
    """

    def rank(record: Row) -> tuple[bool, float, int]:
        kept, gone = record["utility"], 1.0 - record["leak"]
        merit = 2.0 * kept * gone / (kept + gone) if kept and gone else 0.0
        return record["clean"], merit if record["clean"] else gone, record["iteration"]

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


def iteration_name(number: int) -> str:
    """The phase of a round, counted from 1."""
    return f"iteration-{number:02d}"


def training_policy(engine: Engine) -> Policy:
    """The scorer's policy, with the adapters' dropout."""
    policy = engine.scorer.policy
    dropout = engine.part.dropout if isinstance(engine.part, Lora) else 0.0
    compute = dataclasses.replace(policy.compute, lora_dropout=dropout)
    return dataclasses.replace(policy, compute=compute)


def export(engine: Engine, trained: Params, form: str, folder: Path) -> None:
    """Writes what is trained as a Hugging Face folder ("export"), or in PEFT's form ("adapter")."""
    if form == "adapter":
        assert isinstance(engine.part, Lora)
        base = engine.config.model.path
        adapters.save_adapters(folder, engine.model.config, engine.part, trained, base)
        return
    params = merged(engine.assemble(trained))
    engine.model.save(folder, params, engine.config.model.export_dtype)


class _Compilations:
    """Counts the programs that XLA compiles in this process."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        del duration_secs, kwargs
        self.count += event == "/jax/core/compile/backend_compile_duration"


@functools.cache
def _compilations() -> _Compilations:
    """One counter for all runs of a process: JAX keeps its listeners for good."""
    return _Compilations()


class Run:
    """The stages of one run. Holds the weights of the phase it is at, and no others."""

    def __init__(self, engine: Engine, materials: Materials | None = None):
        """Opens the run.

        Args:
          engine: of the run.
          materials: what several runs share; its own by default.
        """
        self.engine = engine
        self.materials = materials or Materials(lambda stage: engine, lambda: self.model("start"))
        self._name, self._weights = "", {}
        self._last_count = _compilations().count

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
        if self.keeps_ema and name != "warmup":
            abstract["ema"] = params
        return self.engine.checkpoints.load_phase(name, abstract)

    def rounds(self) -> list[Row]:
        """The method itself: optimizes round by round; returns the records of `validate`."""
        raise NotImplementedError

    @property
    def keeps_ema(self) -> bool:
        """Whether rounds keep a moving average of the parameters."""
        return False

    def keep_only(self, best: Row, iteration: int) -> None:
        """Drops the weights of iterations that can no longer be needed."""
        for old in range(1, iteration):
            if old != best["iteration"]:
                self.engine.checkpoints.drop_phase(iteration_name(old))

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

    def validate(self, iteration: int, more: Callable[[], Row] = dict) -> Row:
        """Scores on the validation splits, which early stop and best checkpoint go by.

        Args:
          iteration: the round that has been optimized.
          more: what else its record is to hold.
        """
        engine, splits = self.engine, self.engine.splits
        file = f"iterations/{iteration:02d}/metrics.json"

        def make() -> Row:
            _, scores = engine.evaluate(
                f"{iteration_name(iteration)}/validate",
                f"iteration {iteration}: validation",
                self.model(iteration_name(iteration)),
                splits.for_validation(),
            )
            leak = max(scores["forget"]["cot_leak"], scores["forget"]["answer_leak"])
            record = {
                "iteration": iteration,
                "leak": leak,
                "clean": leak <= engine.config.cipo.leak_goal,
                "utility": utility(scores),
                "validation": scores,
            } | more()
            compiled = {"compilations": self._compilations_since_last()}
            engine.folder.write_json(file, record | compiled)
            return record

        record = engine.folder.once(f"{iteration_name(iteration)}/validate", make, [file])
        forget = record["validation"]["forget"]
        engine.reporter.line(
            f"iteration {iteration}: validation leak {forget['cot_leak']:.1%} in CoT, "
            f"{forget['answer_leak']:.1%} in answers; retain "
            f"{record['validation']['retain']['accuracy']:.1%}, reasoning "
            f"{record['validation']['reasoning']['accuracy']:.1%}"
        )
        return record

    def gold_standard(self) -> ReasoningModel | None:
        """The model that never saw this very forget set, if config.model.retrained is one."""
        engine = self.engine
        path = engine.config.model.retrained
        if not path:
            return None
        retrained = ReasoningModel.open(path, engine.config.think)
        never_saw = retrained.never_saw()
        if never_saw is not None and set(never_saw) != engine.splits.forgotten_people:
            engine.reporter.line(
                "no retrained column: the retrained model that ships never saw another forget set"
            )
            return None
        return retrained

    def evaluate_retrained(self) -> Scores | None:
        """Scores of the gold standard, where there is one."""
        engine, retrained = self.engine, self.gold_standard()
        if retrained is None:
            return None

        def make() -> Row:
            rows, scores = engine.evaluate(
                "retrained",
                "evaluation retrained",
                engine.load_model(retrained),
                engine.splits.for_evaluation(),
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
                    TokenizedExample(engine.model.format.prompt_ids(r["question"]), r["ids"])
                    for r in said
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
        if isinstance(self.engine.part, Lora):
            outputs.append("adapter")

        def make() -> None:
            for output in outputs:
                export(self.engine, self.weights(phase)["params"], output, folder.path / output)

        folder.once("export", make, outputs)

    def conclude(self, before: Scores, records: list[Row]) -> Row:
        """Evaluates and exports the best round.

        Returns:
          {"method", "before", "after": scores, "retrained": scores or None, "iterations": records,
          "best": the chosen round, "fluency": mean log-probability of non-fact tokens before and
          after}.
        """
        best = best_of(records)["iteration"]
        after = self.evaluate("after", iteration_name(best))
        retrained = self.evaluate_retrained()
        fluency = self.fluency()
        self.export(iteration_name(best))
        return {
            "method": self.engine.config.method,
            "before": before,
            "after": after,
            "retrained": retrained,
            "iterations": records,
            "best": best,
            "fluency": fluency,
        }

    # Training.

    def trainer(
        self,
        settings: TrainConfig,
        objective: Objective,
        steps: int,
        ema: bool = False,
        carried: Carried | None = None,
        refers: bool = False,
    ) -> tuple[Trainer, Any]:
        """A phase's trainer and its compiled update.

        Phases whose updates are the same program share one: length and learning rate are data.
        """
        engine = self.engine
        decay = engine.config.cipo.ema_decay if ema else None
        trainer = Trainer(
            training_policy(engine),
            objective,
            make_optimizer(settings, steps),
            engine.mesh,
            settings.accumulation,
            decay,
            engine.part,
            engine.config.seed,
            refers,
            carried,
        )
        program = (
            objective,
            dataclasses.replace(settings, lr=0.0, epochs=0.0, warmup_steps=0, checkpoint_every=1),
            decay,
            engine.part,
            engine.config.seed if trainer.policy.compute.lora_dropout else 0,
            refers,
            engine.config.baseline if carried else None,
        )
        start = tuple(carried.start.items()) if carried else ()
        if program not in engine.updates:
            engine.updates[program] = trainer.make_update()
        # A phase like an earlier one takes its trainer: making a state is a program as well.
        trainer = engine.trainers.setdefault((program, settings, steps, start), trainer)
        return trainer, engine.updates[program]

    def optimize_phase(
        self,
        name: str,
        start: str,
        title: str,
        settings: TrainConfig,
        trained: tuple[Trainer, Any],
        batch_at: Callable[[int], Batch],
        steps: int,
        earlier: int,
    ) -> None:
        """Trains from the weights of one phase to those of another, going on where it was.

        Args:
          name: of the phase.
          start: the phase whose weights it starts from.
          title: of the bar.
          settings: of the optimization.
          trained: from `trainer`.
          batch_at: the batch of each step.
          steps: number of steps.
          earlier: steps of the run before this phase.
        """
        engine = self.engine
        if engine.checkpoints.has_phase(name):  # Killed between the checkpoint and its entry.
            return
        done = engine.checkpoints.latest_step(name) or 0
        engine.log.rewind(earlier + done)
        tokens = _tokens(batch_at(0)) if steps else 0
        with engine.reporter.bar(title, steps) as bar:
            bar.skip(done)

            def on_step(step: int, metrics: dict[str, float]) -> None:
                engine.log.write(earlier + step, name, metrics)
                bar.advance(1, tokens, f"loss {metrics['loss']:.3f}")

            weights = run_phase(
                name,
                trained[0],
                trained[1],
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
        before, self._last_count = self._last_count, _compilations().count
        return self._last_count - before


def _tokens(batch: Any) -> int:
    """Real completion tokens of a batch, roughly the same in each."""
    groups = [g for g in batch.values() if hasattr(g, "lengths")]
    return int(sum(math.fsum(g.lengths.reshape(-1)) for g in groups))
