"""Every method but CiPO: rounds of one loss on fixed data, of which validation keeps the best."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from cipo_jax.data.batches import collate, shuffled_batches
from cipo_jax.training.step import Batch, Carried
from cipo_jax.unlearning import methods
from cipo_jax.unlearning.materials import encoded
from cipo_jax.unlearning.preferences import phase_seed, retained_batches, steps_of
from cipo_jax.unlearning.run import Run, best_of, clean_rounds, iteration_name
from cipo_jax.unlearning.run_folder import Row

_SIDES = ("forget", "target")


class BaselineRun(Run):
    """The stages of one run of a method that is a loss."""

    @property
    def method(self) -> methods.Method:
        """The registry's entry."""
        return methods.find(self.engine.config.method)

    def rounds(self) -> list[Row]:
        """The method itself; returns the records of its rounds."""
        rows = self.data()
        records: list[Row] = []
        for number in range(1, self.engine.config.baseline.rounds + 1):
            self.optimize(rows, number)
            records.append(self.validate(number))
            self.keep_only(best_of(records), number)
            if clean_rounds(records) >= self.engine.config.cipo.patience:
                break
        return records

    def data(self) -> list[Row]:
        """pairs.jsonl: what the loss gets, with log-probabilities under the model before."""
        rows = self.materials.rows(self.method)

        def make() -> Row:
            made = self._with_reference(rows) if self.method.reference == "logps" else rows
            self.engine.folder.write_rows("pairs.jsonl", made)
            return {"rows": len(made)}

        self.engine.folder.once("pairs", make, ["pairs.jsonl"])
        return self.engine.folder.read_rows("pairs.jsonl")

    def _with_reference(self, rows: list[Row]) -> list[Row]:
        params, made = self.model("start"), [dict(row) for row in rows]
        for side in _SIDES:
            if side in rows[0]:
                logps = self.engine.scorer.token_logps(params, *encoded(rows, side))
                for row, token_logps in zip(made, logps, strict=True):
                    row[f"ref_{side}_logp"] = float(token_logps.sum())
        return made

    def optimize(self, rows: list[Row], number: int) -> None:
        """One round: train.epochs over the rows."""
        config, folder = self.engine.config, self.engine.folder

        def make() -> Row:
            batch_at, steps = self._batches(rows, number)
            trained = self.trainer(
                config.train,
                methods.objective_of(self.method.name, config.baseline),
                steps,
                carried=self._carried(number),
                refers=self.method.refers(config.baseline),
            )
            earlier = [f"{iteration_name(i)}/optimize" for i in range(1, number)]
            self.optimize_phase(
                iteration_name(number),
                iteration_name(number - 1) if number > 1 else "start",
                f"iteration {number}: {self.method.name}",
                config.train,
                trained,
                batch_at,
                steps,
                sum(folder.result(stage)["steps"] for stage in earlier),
            )
            return {"steps": steps}

        folder.once(f"{iteration_name(number)}/optimize", make)

    def _carried(self, number: int) -> Carried | None:
        """What goes from step to step; a round goes on with what the last one ended with."""
        carried = methods.carried_of(self.method.name, self.engine.config.baseline)
        if carried is None or number == 1:
            return carried
        last = self.engine.log.last(iteration_name(number - 1))
        before = {name: jnp.float32(last[name]) for name in carried.start}
        after = carried.after(before, {k: jnp.float32(v) for k, v in last.items() if k != "phase"})
        return carried._replace(start={name: float(value) for name, value in after.items()})

    def _batches(self, rows: list[Row], number: int) -> tuple[Callable[[int], Batch], int]:
        """Batches of a round by step, and the number of steps."""
        engine, settings = self.engine, self.engine.config.train
        order = shuffled_batches(len(rows), settings.batch, phase_seed(engine, number, 0))
        sides = {side: encoded(rows, side) for side in _SIDES if side in rows[0]}
        kept = retained_batches(engine, settings, number)
        keeps = self.method.settings(engine.config.baseline).retain != "none"

        def at(step: int) -> Batch:
            picked = order(step)
            batch: Batch = {
                side: collate([found[i] for i in picked], shape)
                for side, (found, shape) in sides.items()
            }
            for side in sides:
                if f"ref_{side}_logp" in rows[0]:
                    reference = [rows[i][f"ref_{side}_logp"] for i in picked]
                    batch[f"ref_{side}"] = np.array(reference, np.float32)
            return batch | (kept(step) if keeps else {})

        return at, steps_of(settings, len(rows))
