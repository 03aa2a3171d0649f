"""CiPO: counterfactual unlearning through iterative preference optimization (arXiv 2604.15847)."""

import dataclasses

from cipo_jax.methods.base import Method, register
from cipo_jax.methods.cipo.config import CipoConfig
from cipo_jax.methods.cipo.pairs import make_pairs, sample_rollouts
from cipo_jax.methods.cipo.training import finetune, optimize_preferences
from cipo_jax.methods.counterfactuals import counterfactuals
from cipo_jax.runs.context import Run
from cipo_jax.runs.evaluation import IterationRecord, Result, converged, select, validated
from cipo_jax.runs.measurement import Measurement
from cipo_jax.runs.weights import Weights
from cipo_jax.shared_config import CounterfactualConfig, RunConfig


def cipo(run: Run, measurement: Measurement) -> Result:
    """Counterfactuals once, then sample, pair and optimize until nothing leaks."""
    config, data, base = run.config.group(CipoConfig), run.workspace.data, run.base
    before = measurement.before(run)
    traces = counterfactuals(run)
    policy = warm = run.stage("warmup", finetune, base, traces, data.retained)
    history: list[IterationRecord] = []
    for i in range(1, config.iterations + 1):
        it = run.at(f"iterations/{i:02d}")
        rollouts = it.stage("rollouts", sample_rollouts, policy, traces, i)
        reference = reference_of(config, base, warm, policy)
        pairs = it.stage("pairs", make_pairs, traces, rollouts, reference)
        policy = it.stage("train", optimize_preferences, policy, pairs, data.retained, i)
        history.append(validated(it, policy, i, rollouts.stats))
        run.drop_weights_before(i, keep=select(history).iteration)
        if converged(history, run.config.selection):
            break
    return measurement.after(run, before, history)


def reference_of(
    config: CipoConfig, base: Weights, warm: Weights, policy: Weights
) -> Weights | None:
    """The weights whose log-probabilities the preference is relative to; None for SimPO."""
    if config.loss == "simpo":
        return None
    return {"base": base, "initial": warm}.get(config.reference, policy)


@dataclasses.dataclass(frozen=True)
class Cipo(Method):
    """The entry of `cipo`."""

    def run(self, run: Run, measurement: Measurement) -> Result:
        return cipo(run, measurement)

    def retains(self, config: RunConfig) -> bool:
        return config.group(CipoConfig).retain_weight > 0

    def trace_settings(self, config: RunConfig) -> CounterfactualConfig | None:
        return config.counterfactual


register(Cipo("cipo", "counterfactual traces, iterative DPO", "2604.15847"))
register(
    Cipo("cipo_simpo", "CiPO with SimPO in place of DPO", "2604.15847", {"cipo.loss": "simpo"})
)
