"""Every method's loss against its formula, on full logits and activations of a random model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_trees_equal

from cipo_jax import losses
from cipo_jax.config import Config
from cipo_jax.data.batches import PadShape, TokenizedExample, collate, collate_pairs
from cipo_jax.errors import UserError
from cipo_jax.methods.cipo.config import CipoConfig
from cipo_jax.methods.cipo.objective import PreferenceObjective
from cipo_jax.methods.distillation import DistillationConfig
from cipo_jax.methods.fixed_target import FixedTarget, FixedTargetConfig
from cipo_jax.methods.gradient_ascent import GradientAscentConfig
from cipo_jax.methods.npo import NpoConfig
from cipo_jax.methods.pdu import PduConfig
from cipo_jax.methods.preference import AlternateTargets, PreferenceConfig
from cipo_jax.methods.refusal import IdkAnswerTargets, IdkTargets, RefusalConfig, RefusalTargets
from cipo_jax.methods.registry import METHODS, find
from cipo_jax.methods.representation import OwnThoughtTargets, RepresentationConfig
from cipo_jax.methods.retain import HiddenRetain, KdRetain, KlRetain, NllRetain, NoRetain
from cipo_jax.methods.targets import CounterfactualTargets
from cipo_jax.models.decoder import (
    Compute,
    DecoderConfig,
    abstract_params,
    head_matrix,
    hidden_states,
    layer_states,
)
from cipo_jax.models.trainable import ParamSubset
from cipo_jax.shared_config import LoraConfig
from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.loop import Callbacks, Phase, train_phase
from cipo_jax.training.objective import StepContext
from cipo_jax.training.policy import Policy
from cipo_jax.training.step import PhaseResult, TrainStep

CONFIG = DecoderConfig(
    vocab_size=40, d_model=16, d_ff=24, layers=2, heads=2, kv_heads=1, head_dim=8, tied_head=True
)
COMPUTE = Compute(logits_chunk=7)  # Divides nothing.
SHAPE = PadShape(16, 12)
LAYER = 0
# f32 sums of numbers of order 10, and logits made a chunk at a time.
RTOL = 2e-5

ALL = (
    "cipo", "cipo_simpo", "ga", "grad_diff", "kl", "npo", "simnpo", "direct_idk", "answer_idk",
    "reasoned_idk", "idk_dpo", "altpo", "rmu", "r2mu", "tru", "undial", "kd", "wga", "satimp",
    "ceu", "pdu", "retrain",
)  # fmt: skip
LOSSES = [name for name in ALL if name not in ("cipo", "cipo_simpo", "retrain")]

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _params(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.0, 0.3, x.shape), jnp.float32), abstract_params(CONFIG)
    )


PARAMS, REFERENCE = _params(0), _params(1)


def _rows(seed, count):
    rng = np.random.default_rng(seed)
    return [
        TokenizedExample(
            rng.integers(0, 40, rng.integers(1, 5)), rng.integers(0, 40, rng.integers(1, 13))
        )
        for _ in range(count)
    ]


# Every group is of one size, so that the model is compiled once.
ROWS = {g: _rows(i, 4) for i, g in enumerate(("forget", "target", "retain", "reasoning"))}
REFS = {
    f"ref_{side}": np.random.default_rng(9 + i).normal(-30.0, 5.0, 4).astype(np.float32)
    for i, side in enumerate(("forget", "target"))
}


def batch_of(name, retain=("retain", "reasoning"), pad_id=0):
    """What a method's loss is given."""
    method = METHODS[name]
    groups = ["forget", *(["target"] if method.targets else []), *retain]
    batch = {g: collate(ROWS[g], SHAPE, pad_id) for g in groups}
    return batch | {k: v for k, v in REFS.items() if k.removeprefix("ref_") in groups}


_states = jax.jit(Policy(CONFIG, COMPUTE).completion_states)
_layer = jax.jit(Policy(CONFIG, COMPUTE).layer_states, static_argnums=2)
_logps = jax.jit(Policy(CONFIG, COMPUTE).completion_logps)


class Quick(Policy):
    """The policy with its models compiled, so that objectives can be run line by line."""

    def completion_states(self, params, sequences):
        return _states(params, sequences)

    def layer_states(self, params, sequences, layer):
        return _layer(params, sequences, layer)

    def completion_logps(self, params, sequences):
        return _logps(params, sequences)


class Spoilt(Quick):
    """Of what is no completion token there is nothing but NaN, of the reference as well."""

    def completion_states(self, params, sequences):
        return _spoil(_states(params, sequences), sequences)

    def layer_states(self, params, sequences, layer):
        return _spoil(_layer(params, sequences, layer), sequences)

    def completion_logps(self, params, sequences):
        return jnp.where(sequences.mask, _logps(params, sequences), jnp.nan)


def _spoil(states, sequences):
    return jnp.where(sequences.mask[..., None], states, jnp.nan)


def value(name, config, batch, policy=Quick):
    context = StepContext(REFERENCE, {"dual": jnp.float32(0.0)})
    return METHODS[name].objective(config)(policy(CONFIG, COMPUTE), PARAMS, batch, context)


# ---- the same from whole sequences


@functools.cache
def _whole(seed):
    params = PARAMS if seed == 0 else REFERENCE

    @jax.jit
    def everything(tokens):
        hidden = hidden_states(CONFIG, Compute(), params, tokens)
        return hidden @ head_matrix(CONFIG, params), layer_states(
            CONFIG, Compute(), params, tokens, LAYER
        )

    return everything


@dataclasses.dataclass(frozen=True)
class Group:
    """Of the real completion tokens of a group, one row after another, in float64."""

    logits: list[np.ndarray]  # [C, V]
    ref_logits: list[np.ndarray]
    states: list[np.ndarray]  # [C, D] of the layer
    ref_states: list[np.ndarray]
    ids: list[np.ndarray]

    @classmethod
    def of(cls, group):
        tokens = jnp.asarray(collate(ROWS[group], SHAPE).tokens)
        found = []
        for seed in (0, 1):
            logits, states = (np.float64(x) for x in _whole(seed)(tokens))
            for array, shift in ((logits, -1), (states, 0)):
                at = [len(r.prompt) + shift for r in ROWS[group]]
                rows = zip(array, at, ROWS[group], strict=True)
                found.append([x[s : s + len(r.completion)] for x, s, r in rows])
        ids = [np.asarray(r.completion) for r in ROWS[group]]
        return cls(found[0], found[2], found[1], found[3], ids)

    @property
    def logps(self):
        """Of each row's own tokens."""
        pairs = zip(self.logits, self.ids, strict=True)
        return [log_softmax(z)[np.arange(len(y)), y] for z, y in pairs]

    @property
    def sums(self):
        return np.array([row.sum() for row in self.logps])

    @property
    def nll(self):
        return -np.mean([row.mean() for row in self.logps])

    @property
    def kl(self):
        return tempered_kl(self, 1.0)

    @property
    def flat(self):
        """logits, ref_logits, ids, all tokens in a row."""
        return (np.concatenate(x) for x in (self.logits, self.ref_logits, self.ids))


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def softplus(x):
    return np.logaddexp(0.0, x)


def over_tokens(rows):
    return np.concatenate(rows).mean()


def tempered_kl(group, temperature):
    logits, reference, _ = group.flat
    p, q = log_softmax(reference / temperature), log_softmax(logits / temperature)
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1).mean()


def misdirected(group, scale):
    u = np.asarray(losses.control_vector(jax.random.key(0), CONFIG.d_model), np.float64)
    return np.square(np.concatenate(group.states) - scale * u).mean()


def cross_entropy(target_logits, logits):
    p = np.exp(log_softmax(target_logits))
    return -np.where(p > 0, p * log_softmax(logits), 0.0).sum(-1).mean()


def undial(group, beta):
    logits, reference, ids = group.flat
    lowered = reference - beta * (np.arange(40) == ids[:, None])
    return cross_entropy(lowered, logits)


def ceu(group):
    logits, _, ids = group.flat
    return cross_entropy(np.where(np.arange(40) == ids[:, None], -np.inf, logits), logits)


def preferred(forget, target, beta):
    margin = (target.sums - REFS["ref_target"]) - (forget.sums - REFS["ref_forget"])
    return 2 / beta * softplus(-beta * margin).mean()


BETA = 0.3


def settings(retain=None, beta=BETA, layer=LAYER):
    """A config that differs from the defaults in every setting of a loss."""
    return Config(
        fixed_target=FixedTargetConfig(
            forget_weight=0.6, retain_weight=0.8, retain=retain, temperature=2.0, layer=layer
        ),
        gradient_ascent=GradientAscentConfig(beta=beta, importance=2.0),
        npo=NpoConfig(beta=beta, delta=0.4),
        preference=PreferenceConfig(beta=beta),
        refusal=RefusalConfig(alpha=0.3),
        representation=RepresentationConfig(
            layer=LAYER, scale=3.0, trace_weight=0.7, reasoning_weight=0.5
        ),
        distillation=DistillationConfig(beta=beta),
    )


def ascent(f, t):
    return over_tokens(f.logps)


def imitation(f, t):
    return t.nll


FORGET = {
    "ga": ascent,
    "grad_diff": ascent,
    "kl": ascent,
    "npo": lambda f, t: 2 / BETA * softplus(BETA * (f.sums - REFS["ref_forget"])).mean(),
    "simnpo": lambda f, t: np.mean(
        [2 / BETA * softplus(-BETA * (-row.mean() - 0.4)) for row in f.logps]
    ),
    "direct_idk": imitation,
    "answer_idk": imitation,
    "reasoned_idk": imitation,
    "idk_dpo": lambda f, t: preferred(f, t, BETA),
    "altpo": lambda f, t: preferred(f, t, BETA),
    "rmu": lambda f, t: misdirected(f, 3.0),
    "r2mu": lambda f, t: misdirected(f, 3.0) + 0.7 * misdirected(t, 3.0),
    "tru": lambda f, t: t.nll + 0.3 * over_tokens(f.logps),
    "undial": lambda f, t: undial(f, BETA),
    "kd": imitation,
    "wga": lambda f, t: over_tokens([np.exp(BETA * row) * row for row in f.logps]),
    "satimp": lambda f, t: over_tokens(
        [np.exp(BETA * row) * (1 - np.exp(row)) ** 2.0 * row for row in f.logps]
    ),
    "ceu": lambda f, t: ceu(f),
    "pdu": lambda f, t: over_tokens(
        [np.square(z.max(-1) - z.mean(-1)) for z in f.logits]
    ),
}  # fmt: skip
RETAIN = {
    "none": lambda r, s: 0.0,
    "nll": lambda r, s: (r.nll + s.nll) / 2,
    "kl": lambda r, s: (r.kl + s.kl) / 2,
    "kd": lambda r, s: (tempered_kl(r, 2.0) + tempered_kl(s, 2.0)) / 2,
    # Weighted by retain_weight and by 1; see the test of RMU below.
    "hidden": lambda r, s: matched(r) + 1.0 / 0.8 * matched(s),
}


def matched(group):
    return np.square(np.concatenate(group.states) - np.concatenate(group.ref_states)).mean()


@functools.cache
def groups():
    return {name: Group.of(name) for name in ROWS}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_the_formula(name):
    loss, metrics = value(name, settings("none"), batch_of(name))
    found = groups()
    wanted = FORGET[name](found["forget"], found["target"])
    assert float(metrics["forget"]) == pytest.approx(wanted, rel=RTOL)
    assert float(loss) == pytest.approx(0.6 * wanted, rel=RTOL)
    assert float(metrics["retained"]) == 0.0


@pytest.mark.parametrize("retain", RETAIN)
def test_what_keeps_the_rest_is_weighed_and_added(retain):
    loss, metrics = value("ga", settings(retain), batch_of("ga"))
    found = groups()
    wanted = RETAIN[retain](found["retain"], found["reasoning"])
    assert float(metrics["retained"]) == pytest.approx(wanted, rel=RTOL, abs=1e-12)
    total = 0.6 * ascent(found["forget"], None) + 0.8 * wanted
    assert float(loss) == pytest.approx(total, rel=RTOL)


def test_rmu_gives_reasoning_a_weight_of_its_own():
    loss, metrics = value("rmu", settings(), batch_of("rmu"))
    found = groups()
    wanted = matched(found["retain"]) + 0.5 / 0.8 * matched(found["reasoning"])
    assert float(metrics["retained"]) == pytest.approx(wanted, rel=RTOL)
    total = 0.6 * misdirected(found["forget"], 3.0) + 0.8 * wanted
    assert float(loss) == pytest.approx(total, rel=RTOL)


@pytest.mark.parametrize("retain", ["nll", "kl", "hidden"])
def test_a_group_that_a_run_lacks_is_no_part_of_the_mean(retain):
    group = groups()["retain"]
    _, metrics = value("ga", settings(retain), batch_of("ga", retain=("retain",)))
    wanted = {"nll": group.nll, "kl": group.kl, "hidden": matched(group)}[retain]
    assert float(metrics["retained"]) == pytest.approx(wanted, rel=RTOL)
    _, metrics = value("ga", settings(retain), batch_of("ga", retain=()))
    assert float(metrics["retained"]) == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_what_padding_holds_has_no_influence_at_all(name):
    config = settings({"pdu": "kl", "ceu": "kd", "npo": "hidden"}.get(name))
    plain, _ = value(name, config, batch_of(name))
    noisy, _ = value(name, config, batch_of(name, pad_id=39), Spoilt)
    assert np.isfinite(plain)
    assert float(noisy) == float(plain)


# ---- the registry


def test_every_method_is_registered():
    assert set(ALL) <= set(METHODS)
    for name, method in METHODS.items():
        assert (method.name, bool(method.about)) == (name, True)
        assert isinstance(method, FixedTarget) == (name in LOSSES)
    assert {name for name in ALL if not METHODS[name].trains} == {"retrain"}


def test_what_each_method_learns_from():
    targets = {name: METHODS[name].targets for name in LOSSES}
    assert {name: builder for name, builder in targets.items() if builder is not None} == {
        "direct_idk": IdkTargets(), "answer_idk": IdkAnswerTargets(),
        "reasoned_idk": RefusalTargets(), "idk_dpo": IdkTargets(), "altpo": AlternateTargets(),
        "r2mu": OwnThoughtTargets(), "tru": RefusalTargets(), "kd": CounterfactualTargets(),
    }  # fmt: skip

    def forget(name):
        return METHODS[name].objective(Config()).forget

    logps = {name for name in LOSSES if forget(name).needs_reference_logps}
    assert logps == {"npo", "idk_dpo", "altpo"}
    trained = {name: METHODS[name].trainable(Config(), EIGHT) for name in LOSSES}
    assert {name for name, part in trained.items() if part is not None} == {"rmu", "r2mu"}
    aux_states = {name: METHODS[name].objective(Config()).initial_aux_state() for name in LOSSES}
    assert {name: aux for name, aux in aux_states.items() if aux} == {"pdu": {"dual": 1.0}}


def test_which_methods_write_traces_and_how():
    config = Config()
    written = {name: METHODS[name].trace_settings(config) for name in ALL}
    refusing = dataclasses.replace(config.counterfactual, strategy="refusal")
    assert {name: traces for name, traces in written.items() if traces is not None} == {
        "cipo": config.counterfactual, "cipo_simpo": config.counterfactual,
        "kd": config.counterfactual, "altpo": config.counterfactual,
        "tru": refusing, "reasoned_idk": refusing,
    }  # fmt: skip
    given = Config(refusal=RefusalConfig(path="refusals.jsonl"))
    assert METHODS["tru"].trace_settings(given) is None


def test_the_base_parameters_are_kept_only_where_they_are_needed():
    def need(retain):
        config = Config(fixed_target=FixedTargetConfig(retain=retain))
        return {name for name in LOSSES if METHODS[name].needs_reference_params(config)}

    assert need(None) == {"rmu", "r2mu", "undial", "kd", "kl"}
    assert need("nll") == need("none") == {"undial"}
    for retain in ("kl", "kd", "hidden"):
        assert need(retain) == set(LOSSES)
    assert not METHODS["cipo"].needs_reference_params(Config())


def test_which_methods_train_on_what_is_retained():
    assert {name for name in ALL if not METHODS[name].retains(Config())} == {"ga", "retrain"}
    none = Config(fixed_target=FixedTargetConfig(retain="none"), cipo=CipoConfig(retain_weight=0.0))
    assert not any(METHODS[name].retains(none) for name in ALL)


def test_the_defaults_are_those_of_the_papers():
    def found(name):
        made = METHODS[name].objective(Config())
        beta = getattr(made.forget, "beta", None)
        return beta, made.forget_weight, made.retain_weight, made.retain

    assert found("ga") == (None, 1.0, 1.0, NoRetain())
    assert found("grad_diff") == (None, 1.0, 1.0, NllRetain())
    assert found("kl")[3] == KlRetain()
    assert found("npo") == (0.1, 1.0, 1.0, NllRetain())
    assert found("simnpo") == (4.5, 0.125, 1.0, NllRetain())
    for name in ("idk_dpo", "altpo"):
        assert found(name) == (0.1, 1.0, 1.0, NllRetain())
    assert found("wga")[0] == 1.0
    assert found("satimp")[0] == 5.0
    assert METHODS["satimp"].objective(Config()).forget.importance == 1.0
    assert found("undial")[0] == 10.0
    tru = METHODS["tru"].objective(Config())
    assert tru.retain_weight == pytest.approx(tru.forget.alpha) == 0.1
    for name in ("rmu", "r2mu"):
        assert found(name)[2:] == (1.4, HiddenRetain(7, (1.0, 1.0 / 1.4)))
    assert found("kd")[3] == KdRetain(1.0)
    pdu = METHODS["pdu"].objective(Config())
    assert (pdu.epsilon, pdu.dual_lr) == (0.3, 1.0)


def test_defaults_never_beat_what_a_user_set():
    given = settings(beta=0.7)
    fixed = FixedTargetConfig(forget_weight=2.0, retain_weight=3.0, retain="kl")
    given = dataclasses.replace(given, fixed_target=fixed)
    for name in LOSSES:
        made = METHODS[name].objective(given)
        assert (made.forget_weight, made.retain_weight) == (2.0, 3.0)
        assert made.retain == KlRetain()
        assert getattr(made.forget, "beta", 0.7) == 0.7
    simnpo = METHODS["simnpo"].objective(Config(npo=NpoConfig(beta=0.7)))
    assert (simnpo.forget.beta, simnpo.forget_weight) == (0.7, 0.125)


def test_weights_of_zero_can_be_asked_for():
    given = Config(fixed_target=FixedTargetConfig(forget_weight=0.0, retain_weight=0.0))
    for name in LOSSES:
        made = METHODS[name].objective(given)
        assert made.forget_weight == 0.0
        if name not in ("rmu", "r2mu"):
            assert made.retain_weight == 0.0


def test_overrides_never_beat_what_a_user_set():
    def configured(config):
        return METHODS[config.method].configured(config)

    simpo = configured(Config(method="cipo_simpo"))
    assert simpo.cipo.loss == "simpo"
    assert configured(simpo) == simpo
    # A value that another loss has by default is a value like any other.
    asked = configured(Config(method="cipo_simpo", cipo=CipoConfig(beta=0.1)))
    assert asked.cipo.beta == 0.1
    given = Config(method="cipo_simpo", cipo=CipoConfig(loss="ipo", beta=0.7))
    assert configured(given) == given
    half = configured(Config(method="cipo_simpo", cipo=CipoConfig(beta=0.7)))
    assert (half.cipo.loss, half.cipo.beta) == ("simpo", 0.7)
    for name in set(ALL) - {"cipo_simpo"}:
        assert configured(Config(method=name)) == Config(method=name)


@pytest.mark.parametrize(("loss", "beta"), [("dpo", 0.1), ("ipo", 0.1), ("simpo", 2.0)])
def test_each_preference_loss_has_its_own_strength_unless_it_is_given(loss, beta):
    batch = {
        "pairs": collate_pairs(ROWS["target"], ROWS["forget"], SHAPE),
        "ref": np.stack([REFS["ref_target"], REFS["ref_forget"]], axis=1),
    }

    def at(beta):
        objective = PreferenceObjective.from_config(CipoConfig(loss=loss, beta=beta))
        return float(objective(Quick(CONFIG, COMPUTE), PARAMS, batch, StepContext())[0])

    assert at(None) == at(beta) != at(beta + 0.1)


def test_equal_settings_are_one_objective():
    def objective(name, beta):
        config = dataclasses.replace(
            Config(npo=NpoConfig(beta=beta)), gradient_ascent=GradientAscentConfig(beta=beta)
        )
        return METHODS[name].objective(config)

    one, same = objective("npo", 0.2), objective("npo", 0.2)
    assert one == same and hash(one) == hash(same)
    assert objective("npo", 0.3) != one
    assert objective("wga", 0.2) != one


# ---- PDU's dual variable, and the reference of the update


def pdu_step(mesh):
    config = Config(
        fixed_target=FixedTargetConfig(retain="kl", retain_weight=0.9),
        pdu=PduConfig(epsilon=0.03, dual_lr=10.0),
    )
    assert METHODS["ga"].objective(config).initial_aux_state() == {}
    objective = METHODS["pdu"].objective(config)
    return TrainStep(Policy(CONFIG, COMPUTE), objective, optax.sgd(0.5), mesh)


def test_the_dual_variable_follows_what_is_retained(one_device, tmp_path):
    step = pdu_step(one_device)
    state = step.init(PARAMS)
    frozen, batch = jax.device_put(PARAMS), step.put(batch_of("pdu", ("retain",)))
    duals, checkpoints = [0.9], Checkpoints(tmp_path)
    for number in range(2):
        state, metrics = step(state, batch, frozen)
        metrics = {k: float(v) for k, v in metrics.items()}
        # The weight of a step is the dual variable from before it.
        assert metrics["dual"] == pytest.approx(duals[-1], rel=1e-5)
        total = metrics["forget"] + duals[-1] * metrics["retained"]
        assert metrics["loss"] == pytest.approx(total, rel=1e-5)
        if number == 0:  # The model is its own reference still.
            assert metrics["retained"] == pytest.approx(0.0, abs=1e-6)
        duals.append(max(duals[-1] + 10.0 * (metrics["retained"] - 0.03), 0.0))
        assert float(state.aux_state["dual"]) == pytest.approx(duals[-1], rel=1e-5)
        if number == 0:  # A run that is stopped here goes on from the same state.
            checkpoints.save_step("pdu", 1, state)
            restored = checkpoints.load_step("pdu", 1, step.abstract_state())
            assert_trees_equal(restored, state)
            state = restored
    assert duals[0] > duals[1] > 0.0 and duals[2] > duals[1]


def test_the_dual_variable_goes_on_from_round_to_round(one_device, tmp_path):
    step, checkpoints, seen = pdu_step(one_device), Checkpoints(tmp_path), []
    frozen, batch = jax.device_put(PARAMS), batch_of("pdu", ("retain",))
    start = PhaseResult(PARAMS)
    for name in ("iteration-01", "iteration-02"):
        phase = Phase(name, step, None, 2, 50)
        callbacks = Callbacks(on_step=lambda _, metrics: seen.append(metrics))
        ended = train_phase(phase, start, lambda _: batch, checkpoints, callbacks, frozen)
        checkpoints.save_phase(name, ended)
        start = checkpoints.load_phase(name, step.abstract_result())
        # Where the last step's ascent led.
        wanted = max(seen[-1]["dual"] + 10.0 * (seen[-1]["retained"] - 0.03), 0.0)
        assert float(start.aux_state["dual"]) == pytest.approx(wanted, rel=1e-5)
        if name == "iteration-01":
            first = wanted
    duals = [metrics["dual"] for metrics in seen]
    assert duals[0] == pytest.approx(0.9, rel=1e-6)
    assert duals[2] == pytest.approx(first, rel=1e-5) != duals[1]


def test_the_dual_variable_ascends_by_the_excess_of_what_is_retained():
    config = Config(pdu=PduConfig(epsilon=0.3, dual_lr=0.5))
    objective = METHODS["pdu"].objective(config)

    def after(dual, retained):
        metrics = {"retained": jnp.float32(retained)}
        return float(objective.update_aux_state({"dual": jnp.float32(dual)}, metrics)["dual"])

    assert after(0.8, 0.7) == pytest.approx(1.0, rel=1e-6)
    assert after(1.0, 0.0) == pytest.approx(0.85, rel=1e-6)
    assert after(0.1, 0.0) == 0.0


# ---- what is refused


def test_an_unknown_method_is_told_with_the_nearest():
    with pytest.raises(UserError) as error:
        find("nop")
    said = str(error.value)
    assert said.startswith("config.method = 'nop': no such method; nearest: npo")
    assert all(name in said for name in ALL) and "\n" not in said
    assert find("npo") is METHODS["npo"]


EIGHT = dataclasses.replace(CONFIG, layers=8)


@pytest.mark.parametrize("name", ["rmu", "r2mu"])
def test_a_layer_has_to_be_there_where_it_is_looked_at(name):
    config = Config(representation=RepresentationConfig(layer=8))
    with pytest.raises(UserError, match=r"config\.representation\.layer = 8: .* layers 0 to 7"):
        METHODS[name].trainable(config, EIGHT)
    METHODS[name].trainable(Config(), EIGHT)
    METHODS["ga"].trainable(Config(), CONFIG)  # It never looks at layer 7.
    hidden = Config(fixed_target=FixedTargetConfig(retain="hidden"))
    with pytest.raises(UserError, match=r"config\.fixed_target\.layer = 7: .* layers 0 to 1"):
        METHODS["ga"].trainable(hidden, CONFIG)
    hidden = Config(fixed_target=FixedTargetConfig(layer=8))
    with pytest.raises(UserError, match=r"config\.fixed_target\.layer = 8: .* layers 0 to 7"):
        METHODS[name].trainable(hidden, EIGHT)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (5, 6, 7)),
        ({"layer": 1}, (0, 1)),
        ({"layer": 4}, (2, 3, 4)),
        ({"layers": (0, 6)}, (0, 6)),
    ],
)
def test_rmu_trains_the_layers_that_it_is_told(changes, layers):
    config = Config(representation=RepresentationConfig(**changes))
    assert METHODS["rmu"].trainable(config, EIGHT) == ParamSubset(layers, ("down_proj",))


def test_rmu_refuses_layers_that_cannot_change_what_it_looks_at():
    config = Config(representation=RepresentationConfig(layer=3, layers=(4, 5)))
    with pytest.raises(
        UserError, match=r"config\.representation\.layers = \(4, 5\): all lie above"
    ):
        METHODS["rmu"].trainable(config, EIGHT)


def test_what_cannot_stand_beside_adapters_is_refused(tmp_path):
    lora = LoraConfig(rank=4)
    for name in ("rmu", "r2mu"):
        with pytest.raises(UserError, match=rf"config\.lora\.rank: {name} trains layers"):
            METHODS[name].trainable(Config(lora=lora), EIGHT)
    assert METHODS["kl"].trainable(Config(lora=lora), EIGHT).rank == 4
    assert METHODS["kl"].trainable(Config(), EIGHT) is None
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}'
    )
    given = LoraConfig(path=str(tmp_path))
    with pytest.raises(UserError, match=r"config\.lora\.path: kl compares with the base"):
        METHODS["kl"].trainable(Config(lora=given), EIGHT)
    assert METHODS["grad_diff"].trainable(Config(lora=given), EIGHT).rank == 4
    for name in ("rmu", "r2mu"):
        with pytest.raises(UserError, match=rf"config\.lora\.rank: {name} trains layers"):
            METHODS[name].trainable(Config(lora=given), EIGHT)
