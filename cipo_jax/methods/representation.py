"""Hidden states are driven to a random vector: rmu, r2mu."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cipo_jax import losses
from cipo_jax.data.batches import TokenizedExample
from cipo_jax.errors import UserError
from cipo_jax.methods.base import register
from cipo_jax.methods.fixed_target import FixedTarget, FixedTargetConfig
from cipo_jax.methods.objective import ForgetLoss
from cipo_jax.methods.targets import Target, TargetBuilder, own_answers
from cipo_jax.models.decoder import DecoderConfig
from cipo_jax.models.trainable import ParamSubset, Trainable
from cipo_jax.runs.context import Run
from cipo_jax.settings import setting
from cipo_jax.shared_config import RunConfig
from cipo_jax.training.objective import Batch, Metrics, StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class RepresentationConfig:
    """RMU (arXiv 2403.03218) and R2MU (arXiv 2506.12963)."""

    layer: int = setting(7, "layer whose output is driven to the control vector, from 0", 0)
    scale: float = setting(6.5, "length of the control vector", 0.0)
    layers: tuple[int, ...] | None = setting(
        None, "layers that are trained; None for `layer` and the two below", 0
    )
    target_modules: tuple[str, ...] = setting(
        ("down_proj",), "projections that are trained, by their names in transformers"
    )
    trace_weight: float = setting(
        1.0, "R2MU: weight of the loss on self-generated chains of thought", 0.0
    )
    reasoning_weight: float = setting(
        1.0, "RMU, R2MU: weight of retained reasoning; facts have fixed_target.retain_weight", 0.0
    )
    trace_tokens: int = setting(
        100, "R2MU: tokens of a self-generated chain of thought, from its start", 1
    )


@dataclasses.dataclass(frozen=True)
class Misdirection(ForgetLoss):
    """RMU on forget completions and, where the batch has targets, on thoughts about them.

    Attributes:
      layer: whose output is driven to the control vector, from 0.
      scale: length of the control vector.
      trace_weight: weight of the thoughts.
    """

    layer: int = 7
    scale: float = 6.5
    trace_weight: float = 1.0

    def __call__(
        self, policy: Policy, params: Params, batch: Batch, context: StepContext
    ) -> tuple[Array, Metrics]:
        del context
        direction = losses.control_vector(jax.random.key(0), policy.config.d_model)
        loss, metrics = jnp.zeros(()), {}
        for group, weight in (("forget", 1.0), ("target", self.trace_weight)):
            if group in batch:
                rows = batch[group]
                states = policy.layer_states(params, rows, self.layer)
                term, _ = losses.rmu_forget(
                    states, rows.mask, direction, scale=self.scale, num_tokens=rows.num_tokens
                )
                loss, metrics[f"{group}/mse"] = loss + weight * term, term
        return loss, metrics


@dataclasses.dataclass(frozen=True)
class OwnThoughtTargets(TargetBuilder):
    """The beginning of the model's own thought about each question (R2MU)."""

    def build(self, run: Run, originals: Sequence[TokenizedExample]) -> tuple[Target, ...]:
        chat, length = run.workspace.model.chat, run.config.group(RepresentationConfig).trace_tokens
        found = []
        for item, answer in enumerate(own_answers(run).answers):
            end = chat.answer_start(answer.ids) or len(answer.ids)
            thought = answer.ids[: min(end, length)]
            found.append(Target(item, TokenizedExample(originals[item].prompt, thought)))
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Representation(FixedTarget):
    """A method that trains some projections of some layers alone."""

    def hidden_settings(self, config: RunConfig) -> tuple[int, float]:
        settings, layer = config.group(RepresentationConfig), config.group(FixedTargetConfig).layer
        return (settings.layer if layer is None else layer), settings.reasoning_weight

    def trainable(self, config: RunConfig, decoder: DecoderConfig) -> Trainable:
        """The layers of config.representation; raises UserError where they do not fit."""
        settings = config.group(RepresentationConfig)
        if config.lora.rank or config.lora.path:
            raise UserError(
                f"config.lora.rank: {self.name} trains layers chosen by name "
                "(config.representation.layers), not adapters; set config.lora.rank=0"
            )
        if settings.layer >= decoder.layers:
            raise UserError(
                f"config.representation.layer = {settings.layer}: the model has layers 0 to "
                f"{decoder.layers - 1}"
            )
        self.check_hidden_layer(config, decoder)
        layers = settings.layers
        if layers is None:
            layers = tuple(range(max(settings.layer - 2, 0), settings.layer + 1))
        chosen = ParamSubset.from_config(
            layers, settings.target_modules, decoder, "config.representation"
        )
        if chosen.layers[0] > settings.layer:
            raise UserError(
                f"config.representation.layers = {layers!r}: all lie above "
                f"config.representation.layer = {settings.layer}, whose output they do not change"
            )
        return chosen


def _misdirection(config: RunConfig) -> Misdirection:
    settings = config.group(RepresentationConfig)
    return Misdirection(settings.layer, settings.scale, settings.trace_weight)


register(
    Representation(
        "rmu",
        "activations driven to a random vector",
        "2403.03218",
        loss=_misdirection,
        retain="hidden",
        retain_weight=1.4,
    )
)
register(
    Representation(
        "r2mu",
        "RMU on the model's own thoughts as well",
        "2506.12963",
        loss=_misdirection,
        targets=OwnThoughtTargets(),
        retain="hidden",
        retain_weight=1.4,
    )
)
