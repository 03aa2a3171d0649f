"""Every unlearning method, as an entry on one engine.

An entry says what a method's loss is, what data it needs beside the splits, what it needs of the
model that came in, and how it keeps the rest. Loader, sampler, update step, rounds, choice of the
round to keep, and evaluation are the same for all. docs/adding_a_method.md adds one.
"""

import dataclasses
import difflib
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from cipo_jax import losses
from cipo_jax.config import BaselineConfig, Config
from cipo_jax.errors import UserError
from cipo_jax.models.decoder import DecoderConfig
from cipo_jax.models.lora import lora_of
from cipo_jax.models.trainable import Trainable, param_subset
from cipo_jax.training.step import Batch, Carried, Metrics, Objective, Policy
from cipo_jax.typing import Array, Params
from cipo_jax.unlearning.objectives import RETAINED, nll, retain_term

Retain = Literal["none", "nll", "kl", "kd", "hidden"]
# What a loss is given beside the data; see `unlearning.materials`.
Material = Literal["counterfactual", "refusal", "alternates", "idk", "idk_answer", "own"]
# (settings, policy, params, batch) -> (loss on what is forgotten, metrics)
ForgetLoss = Callable[[BaselineConfig, Policy, Params, Batch], tuple[Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to unlearn.

    Attributes:
      name: as in `config.method`.
      about: one line.
      source: arXiv id.
      loss: on what is forgotten; None where the loop is not "fixed".
      target: completions that the loss gets as batch["target"], row by row beside
        batch["forget"]; None for none.
      reference: what it needs of the model that came in: nothing, log-probabilities of the batch's
        completions (batch["ref_forget"], batch["ref_target"], [B], computed once and kept), or the
        model itself (`Policy.reference`).
      retain: how the rest is kept, unless `config.baseline.retain` says otherwise.
      defaults: its own defaults of `config.baseline`.
      part: whether only `config.baseline.layers` and `targets` are trained.
      dual: whether the weight of what is kept is a dual variable.
      loop: "fixed": rounds of the loss on fixed data; "iterative": CiPO's, which samples anew;
        "none": nothing is trained.
      overrides: settings "group.key" that replace a default of the config.
    """

    name: str
    about: str
    source: str = ""
    loss: ForgetLoss | None = None
    target: Material | None = None
    reference: Literal["none", "logps", "params"] = "none"
    retain: Retain = "nll"
    defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)
    part: bool = False
    dual: bool = False
    loop: Literal["fixed", "iterative", "none"] = "fixed"
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def settings(self, config: BaselineConfig) -> BaselineConfig:
        """The settings with the method's own defaults where they say "own"."""
        own: dict[str, Any] = {"forget_weight": 1.0, "retain_weight": 1.0, "beta": 0.1}
        own |= dict(self.defaults)
        values = {k: v for k, v in own.items() if getattr(config, k) == 0.0}
        if config.retain == "own":
            values["retain"] = self.retain
        return dataclasses.replace(config, **values)

    def refers(self, config: BaselineConfig) -> bool:
        """Whether the model that came in is needed in each step."""
        return self.reference == "params" or self.settings(config).retain in ("kl", "kd", "hidden")


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Makes a method known by its name."""
    METHODS[method.name] = method
    return method


def find(name: str) -> Method:
    """The method of a name; raises UserError with the nearest ones where there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 3, 0.0)
        raise UserError(
            f"config.method = {name!r}: no such method; nearest: {', '.join(near)}; "
            f"all: {', '.join(METHODS)}"
        )
    return METHODS[name]


def import_plugins(config: Config) -> None:
    """Imports the modules that `config.plugins` names, so that their methods are known.

    Raises:
      UserError: where there is no such module.
    """
    for name in (n.strip() for n in config.plugins.split(",") if n.strip()):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"config.plugins: {name!r} cannot be imported ({error}); it is looked for where "
                "Python looks for modules, the present folder among them"
            ) from None


def configured(config: Config) -> Config:
    """The config with the overrides of its method, where it holds the defaults of `Config`."""
    import_plugins(config)
    plain = Config()
    for key, value in find(config.method).overrides.items():
        group, name = key.split(".")
        if getattr(getattr(config, group), name) == getattr(getattr(plain, group), name):
            changed = dataclasses.replace(getattr(config, group), **{name: value})
            config = dataclasses.replace(config, **{group: changed})
    return config


def part_of(config: Config, model: DecoderConfig) -> Trainable:
    """What a run trains: adapters, the method's layers, or everything (None)."""
    method, lora, settings = find(config.method), lora_of(config.lora), config.baseline
    if method.part:
        if lora is not None:
            raise UserError(
                f"config.lora.rank: {method.name} trains layers chosen by name "
                "(config.baseline.layers), not adapters; set config.lora.rank=0"
            )
        layers = settings.layers or f"{max(settings.layer - 2, 0)}-{settings.layer}"
        chosen = param_subset(layers, settings.targets, model, "config.baseline")
        if chosen.layers[0] > settings.layer:
            raise UserError(
                f"config.baseline.layers = {layers!r}: all lie above config.baseline.layer = "
                f"{settings.layer}, whose output they do not change"
            )
        return chosen
    if lora is not None and config.lora.path and method.refers(settings):
        raise UserError(
            f"config.lora.path: {method.name} compares with the model that came in, which has to "
            "be the base of fresh adapters; export the model with its adapters worked in first"
        )
    return lora


def check(config: Config, model: DecoderConfig) -> None:
    """Raises UserError where a method's settings do not fit the model."""
    method, settings = find(config.method), config.baseline
    uses_layer = method.part or method.settings(settings).retain == "hidden"
    if uses_layer and settings.layer >= model.layers:
        raise UserError(
            f"config.baseline.layer = {settings.layer}: the model has layers 0 to "
            f"{model.layers - 1}"
        )


# ---- objectives


@functools.cache
def objective_of(name: str, config: BaselineConfig) -> Objective:
    """forget_weight * loss + retain_weight * what keeps the rest; equal settings, one objective."""
    method = find(name)
    settings = method.settings(config)
    loss = method.loss
    assert loss is not None

    def objective(policy: Policy, params: Params, batch: Batch) -> tuple[Array, Metrics]:
        forget, metrics = loss(settings, policy, params, batch)
        kept, kept_metrics = _retain(settings, policy, params, batch)
        weight = policy.carried["dual"] if method.dual else settings.retain_weight
        metrics = metrics | kept_metrics | {"forget": forget, "retained": kept}
        if method.dual:
            metrics["dual"] = jnp.asarray(weight)
        return settings.forget_weight * forget + weight * kept, metrics

    return objective


def carried_of(name: str, config: BaselineConfig) -> Carried | None:
    """What goes from step to step: PDU's dual variable."""
    method = find(name)
    if not method.dual:
        return None
    settings = method.settings(config)

    def after(carried: dict[str, Array], metrics: Metrics) -> dict[str, Array]:
        dual = losses.dual_ascent(
            carried["dual"], metrics["retained"], epsilon=settings.epsilon, lr=settings.dual_lr
        )
        return {"dual": dual}

    return Carried({"dual": settings.retain_weight}, after)


def _retain(
    settings: BaselineConfig, policy: Policy, params: Params, batch: Batch
) -> tuple[Array, Metrics]:
    """What keeps facts and reasoning, which weigh the same but where their states are matched."""
    if settings.retain == "nll":
        return retain_term(policy, params, batch)
    terms = {}
    for group in RETAINED:
        if group not in batch or settings.retain == "none":
            continue
        sequences = batch[group]
        if settings.retain == "hidden":
            terms[group] = _hidden_match(settings, policy, params, sequences)
        else:
            per_token = losses.kl_per_token
            if settings.retain == "kd":
                per_token = functools.partial(losses.kd_per_token, temperature=settings.temperature)
            terms[group] = _mean(
                _over_vocabulary(policy, [params, policy.reference], sequences, per_token),
                sequences.mask,
            )
    metrics = {f"retain/{group}": value for group, value in terms.items()}
    if not terms:
        return jnp.zeros(()), {}
    if settings.retain == "hidden":
        # As in R2MU, facts have the weight `retain_weight` and reasoning one of its own.
        weights = {"retain": 1.0, "reasoning": settings.reasoning_weight / settings.retain_weight}
        return jnp.stack([weights[g] * v for g, v in terms.items()]).sum(), metrics
    return jnp.stack(list(terms.values())).mean(), metrics


def _hidden_match(
    settings: BaselineConfig, policy: Policy, params: Params, sequences: Any
) -> Array:
    states, frozen = (
        policy.layer_states(p, sequences, settings.layer) for p in (params, policy.reference)
    )
    return losses.hidden_match(states, frozen, sequences.mask)[0]


def _over_vocabulary(
    policy: Policy, models: list[Params], sequences: Any, function: Any, *per_token: Array
) -> Array:
    """A function of next-token logits at each completion token, a chunk of tokens at a time."""
    states = [(policy.completion_states(p, sequences), policy.head(p)) for p in models]
    return losses.over_chunks(function, states, *per_token, chunk=policy.compute.logits_chunk)


def _mean(values: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


# ---- losses on what is forgotten


def _forget_logps(policy: Policy, params: Params, batch: Batch) -> tuple[Array, Array]:
    return policy.completion_logps(params, batch["forget"]), batch["forget"].mask


def _sums(policy: Policy, params: Params, sequences: Any) -> Array:
    return losses.sequence_logps(policy.completion_logps(params, sequences), sequences.mask)


def _ga(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    del s
    return losses.ga(*_forget_logps(policy, params, batch))


def _npo(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    return losses.npo(_sums(policy, params, batch["forget"]), batch["ref_forget"], beta=s.beta)


def _simnpo(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    sums = _sums(policy, params, batch["forget"])
    return losses.simnpo(sums, batch["forget"].lengths, beta=s.beta, delta=s.delta)


def _wga(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    return losses.wga(*_forget_logps(policy, params, batch), beta=s.beta)


def _satimp(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    logps, mask = _forget_logps(policy, params, batch)
    return losses.satimp(logps, mask, beta1=s.beta, beta2=s.importance)


def _imitate(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    """NLL of what is to be said instead."""
    del s
    loss = nll(policy, params, batch["target"])
    return loss, {"target/nll": loss}


def _prefer(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    """DPO from the original to what is to be said instead."""
    return losses.idk_dpo(
        _sums(policy, params, batch["target"]),
        _sums(policy, params, batch["forget"]),
        batch["ref_target"],
        batch["ref_forget"],
        beta=s.beta,
    )


def _tru(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    target, metrics = _imitate(s, policy, params, batch)
    away, more = losses.ga(*_forget_logps(policy, params, batch))
    return target + s.alpha * away, metrics | more


def _undial(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    forget = batch["forget"]
    per_token = functools.partial(losses.undial_per_token, beta=s.beta)
    models = [params, policy.reference]
    values = _over_vocabulary(policy, models, forget, per_token, forget.completions)
    loss = _mean(values, forget.mask)
    return loss, {"forget/undial": loss}


def _ceu(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    del s
    forget = batch["forget"]
    values = _over_vocabulary(policy, [params], forget, losses.ceu_per_token, forget.completions)
    loss = _mean(values, forget.mask)
    return loss, {"forget/ceu": loss}


def _flatness(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    del s
    forget = batch["forget"]
    values = _over_vocabulary(policy, [params], forget, losses.flatness_per_token)
    loss = _mean(values, forget.mask)
    return loss, {"forget/flatness": loss}


def _misdirect(s: BaselineConfig, policy: Policy, params: Params, batch: Batch) -> Any:
    """RMU on what is forgotten and, where the batch has them, on thoughts about it."""
    direction = losses.control_vector(jax.random.key(0), policy.config.d_model)
    loss, metrics = jnp.zeros(()), {}
    for group, weight in (("forget", 1.0), ("target", s.trace_weight)):
        if group in batch:
            states = policy.layer_states(params, batch[group], s.layer)
            term, _ = losses.rmu_forget(states, batch[group].mask, direction, scale=s.scale)
            loss, metrics[f"{group}/mse"] = loss + weight * term, term
    return loss, metrics


for _method in (
    Method("cipo", "counterfactual traces, iterative DPO", "2604.15847", loop="iterative"),
    Method(
        "cipo_simpo",
        "CiPO with SimPO in place of DPO",
        "2604.15847",
        loop="iterative",
        overrides={"cipo.loss": "simpo"},
    ),
    Method("ga", "gradient ascent", "2210.01504", _ga, retain="none"),
    Method("grad_diff", "gradient ascent, NLL on what is kept", "2203.12817", _ga),
    Method("kl", "gradient ascent, KL to the model before on what is kept", "2401.06121", _ga,
           retain="kl"),
    Method("npo", "negative preference optimization", "2404.05868", _npo, reference="logps"),
    Method("simnpo", "NPO without a reference, per token", "2410.07163", _simnpo,
           defaults={"beta": 4.5, "forget_weight": 0.125}),
    Method("wga", "gradient ascent weighted by p", "2502.19301", _wga, defaults={"beta": 1.0}),
    Method("satimp", "saturation and importance weights", "2505.11953", _satimp,
           defaults={"beta": 5.0}),
    Method("direct_idk", "an IDK sentence as thought and answer", "2505.15214", _imitate, "idk"),
    Method("answer_idk", "the thought stays, the answer is IDK", "2505.15214", _imitate,
           "idk_answer"),
    Method("reasoned_idk", "a thought that ends in not knowing", "2505.15214", _imitate, "refusal"),
    Method("idk_dpo", "DPO towards IDK", "2401.06121", _prefer, "idk", reference="logps"),
    Method("altpo", "DPO towards several other answers", "2409.13474", _prefer, "alternates",
           reference="logps"),
    Method("rmu", "activations driven to a random vector", "2403.03218", _misdirect,
           reference="params", retain="hidden", part=True, defaults={"retain_weight": 1.4}),
    Method("r2mu", "RMU on the model's own thoughts as well", "2506.12963", _misdirect, "own",
           reference="params", retain="hidden", part=True, defaults={"retain_weight": 1.4}),
    Method("tru", "reasoned refusals, and the original pushed away", "2603.09980", _tru, "refusal",
           defaults={"retain_weight": 0.1}),
    Method("undial", "the model before with the true token's logit lowered", "2402.10052", _undial,
           reference="params", defaults={"beta": 10.0}),
    Method("kd", "counterfactuals learnt, distillation on what is kept", "1503.02531", _imitate,
           "counterfactual", reference="params", retain="kd"),
    Method("ceu", "cross entropy to itself without the true token", "2503.01224", _ceu),
    Method("pdu", "flat logits, what is kept as a constraint", "2506.05314", _flatness, dual=True),
    Method("retrain", "the gold standard: a model that never saw what is forgotten",
           loop="none"),
):  # fmt: skip
    register(_method)
