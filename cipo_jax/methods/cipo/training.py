"""CiPO's two training stages: the supervised warm-up, and an iteration's preference phase."""

from collections.abc import Callable

import numpy as np

from cipo_jax.data.batches import CompletionBatch, collate, collate_pairs, shuffled_batches
from cipo_jax.methods.batches import nothing_retained, retained_batches
from cipo_jax.methods.cipo.config import CipoConfig
from cipo_jax.methods.cipo.objective import PreferenceObjective, WarmupObjective
from cipo_jax.methods.cipo.pairs import Pairs, pair_shape
from cipo_jax.methods.counterfactual_records import Counterfactuals
from cipo_jax.runs.context import Run, iteration_name
from cipo_jax.runs.data import RetainedExamples
from cipo_jax.runs.identity import derive_seed
from cipo_jax.runs.training import Batches, num_steps, optimize
from cipo_jax.runs.weights import Weights
from cipo_jax.shared_config import TrainConfig
from cipo_jax.training.objective import Batch


def keeps_ema(config: CipoConfig) -> bool:
    """Whether the reference is a moving average."""
    return config.reference == "ema" and config.loss != "simpo"


def finetune(
    run: Run, base: Weights, traces: Counterfactuals, retained: RetainedExamples
) -> Weights:
    """Stage: supervised warm-up on the counterfactuals."""
    objective = WarmupObjective(run.config.group(CipoConfig).retain_weight)
    settings, seed = run.config.warmup, run.config.seed
    rows, shape = [c.tokenized() for c in traces.accepted], pair_shape(run)
    order = shuffled_batches(len(rows), settings.batch_size, derive_seed(seed, 0, 0))
    kept = _kept(run, retained, settings, 0)

    def at(step: int) -> Batch:
        return {"chosen": collate([rows[i] for i in order(step)], shape)} | kept(step)

    batches = Batches(at, num_steps(settings, len(rows)))
    return optimize(run, "warmup", "warm-up", base, objective, settings, batches)


def optimize_preferences(
    run: Run, policy: Weights, pairs: Pairs, retained: RetainedExamples, iteration: int
) -> Weights:
    """Stage: preference optimization on the pairs of an iteration."""
    config, settings = run.config.group(CipoConfig), run.config.train
    batches = _pair_batches(run, pairs, retained, iteration)
    return optimize(
        run,
        iteration_name(iteration),
        f"iteration {iteration}: {config.loss}",
        policy,
        PreferenceObjective.from_config(config),
        settings,
        batches,
        config.ema_decay if keeps_ema(config) else None,
    )


def _pair_batches(run: Run, pairs: Pairs, retained: RetainedExamples, iteration: int) -> Batches:
    settings, seed, rows = run.config.train, run.config.seed, pairs.pairs
    sides = [pair.tokenized() for pair in rows]
    weights = np.array([pair.weight for pair in rows], np.float32)
    refs = [[pair.chosen.ref_logp, pair.rejected.ref_logp] for pair in rows]
    shape = pair_shape(run)
    order = shuffled_batches(len(rows), settings.batch_size, derive_seed(seed, iteration, 0))
    kept = _kept(run, retained, settings, iteration)

    def at(step: int) -> Batch:
        picked = order(step)
        chosen, rejected = zip(*(sides[i] for i in picked), strict=True)
        batch: Batch = {"pairs": collate_pairs(chosen, rejected, shape), "weights": weights[picked]}
        if rows[0].reference is not None:
            batch["ref"] = np.array([refs[i] for i in picked], np.float32)
        return batch | kept(step)

    return Batches(at, num_steps(settings, len(rows)))


def _kept(
    run: Run, retained: RetainedExamples, settings: TrainConfig, phase: int
) -> Callable[[int], dict[str, CompletionBatch]]:
    """Batches of what is retained, or nothing where CiPO gives them no weight."""
    if not run.config.group(CipoConfig).retain_weight:
        return nothing_retained
    return retained_batches(retained, settings, run.config.seed, phase)
