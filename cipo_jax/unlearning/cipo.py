"""CiPO: counterfactual unlearning through iterative preference optimization (arXiv 2604.15847).

`CipoRun.rounds` reads like the paper's algorithm. Each call in it is a stage of the run folder: it
happens once, whole, and a run that is killed anywhere goes on where it was.
"""

from cipo_jax.evals.leakage import share
from cipo_jax.unlearning import preferences
from cipo_jax.unlearning.objectives import preference_objective, warmup_objective
from cipo_jax.unlearning.run import Run, best_of, clean_rounds, iteration_name
from cipo_jax.unlearning.run_folder import Row


class CipoRun(Run):
    """The stages of one CiPO run."""

    def rounds(self) -> list[Row]:
        """The method itself; returns the records of its iterations."""
        counterfactuals = self.counterfactuals()
        self.warmup(counterfactuals)
        records: list[Row] = []
        for iteration in range(1, self.engine.config.cipo.iterations + 1):
            self.rollouts(counterfactuals, iteration)
            self.pairs(counterfactuals, iteration)
            self.optimize(iteration)
            records.append(self.validate(iteration, lambda i=iteration: self.said(i)))
            self.keep_only(best_of(records), iteration)
            if clean_rounds(records) >= self.engine.config.cipo.patience:
                break
        return records

    @property
    def keeps_ema(self) -> bool:
        """Whether the reference is a moving average."""
        settings = self.engine.config.cipo
        return settings.reference == "ema" and settings.loss != "simpo"

    def counterfactuals(self) -> list[Row]:
        """counterfactuals.jsonl: the model's own traces to other answers."""
        return self.materials.counterfactuals()

    def warmup(self, counterfactuals: list[Row]) -> None:
        """Supervised warm-up on the counterfactuals."""
        settings = self.engine.config.warmup

        def make() -> Row:
            batch_at, steps = preferences.warmup_batches(self.engine, counterfactuals)
            trained = self.trainer(settings, warmup_objective(self.engine.config.cipo), steps)
            self.optimize_phase("warmup", "start", "warm-up", settings, trained, batch_at, steps, 0)
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

        self.engine.folder.once(f"{iteration_name(iteration)}/rollouts", make, [file])

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

        self.engine.folder.once(f"{iteration_name(iteration)}/pairs", make, [file])

    def optimize(self, iteration: int) -> None:
        """Preference optimization on the pairs of this iteration."""
        config, folder = self.engine.config, self.engine.folder

        def make() -> Row:
            pairs = folder.read_rows(f"iterations/{iteration:02d}/pairs.jsonl")
            batch_at, steps = preferences.pair_batches(self.engine, pairs, iteration)
            objective = preference_objective(config.cipo)
            trained = self.trainer(config.train, objective, steps, self.keeps_ema)
            earlier = ["warmup", *(f"{iteration_name(i)}/optimize" for i in range(1, iteration))]
            self.optimize_phase(
                iteration_name(iteration),
                self._before(iteration),
                f"iteration {iteration}: {config.cipo.loss}",
                config.train,
                trained,
                batch_at,
                steps,
                sum(folder.result(stage)["steps"] for stage in earlier),
            )
            return {"steps": steps}

        folder.once(f"{iteration_name(iteration)}/optimize", make)

    def said(self, iteration: int) -> Row:
        """What the rollouts of an iteration gave away."""
        return {"rollouts": self.engine.folder.result(f"{iteration_name(iteration)}/rollouts")}

    @staticmethod
    def _before(iteration: int) -> str:
        return "warmup" if iteration == 1 else iteration_name(iteration - 1)
