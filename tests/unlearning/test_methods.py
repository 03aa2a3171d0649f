"""Every method's loss against its formula, on full logits and activations of a random model."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cipo_jax.unlearning import methods
from cipo_jax.unlearning.baseline import BaselineRun
from cipo_jax.unlearning.methods import METHODS, carried_of, configured, find, objective_of, part_of
from cipo_jax.unlearning.objectives import preference_objective
from cipo_jax.unlearning.run_folder import MetricsLog
from trees import assert_trees_equal

from cipo_jax import losses
from cipo_jax.config import BaselineConfig, CipoConfig, Config, LoraConfig
from cipo_jax.data.batches import Shape, TokenizedExample, collate
from cipo_jax.errors import UserError
from cipo_jax.models.decoder import (
    Compute,
    DecoderConfig,
    abstract_params,
    head_matrix,
    hidden_states,
    layer_states,
)
from cipo_jax.models.trainable import ParamSubset
from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.step import Policy, Trainer

CONFIG = DecoderConfig(
    vocab_size=40, d_model=16, d_ff=24, layers=2, heads=2, kv_heads=1, head_dim=8, tied_head=True
)
COMPUTE = Compute(logits_chunk=7)  # Divides nothing.
SHAPE = Shape(16, 12)
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
    groups = ["forget", *(["target"] if method.target else []), *retain]
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


def value(name, settings, batch, policy=Quick):
    made = policy(CONFIG, COMPUTE, REFERENCE, {"dual": jnp.float32(0.0)})
    return objective_of(name, settings)(made, PARAMS, batch)


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


SETTINGS = BaselineConfig(
    forget_weight=0.6, retain_weight=0.8, importance=2.0, delta=0.4, alpha=0.3, temperature=2.0,
    layer=LAYER, scale=3.0, trace_weight=0.7, reasoning_weight=0.5,
)  # fmt: skip
BETA = 0.3


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
    # Weighted by retain_weight and by reasoning_weight.
    "hidden": lambda r, s: matched(r) + 0.5 / 0.8 * matched(s),
}


def matched(group):
    return np.square(np.concatenate(group.states) - np.concatenate(group.ref_states)).mean()


@functools.cache
def groups():
    return {name: Group.of(name) for name in ROWS}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_the_formula(name):
    settings = dataclasses.replace(SETTINGS, beta=BETA, retain="none")
    loss, metrics = value(name, settings, batch_of(name))
    found = groups()
    wanted = FORGET[name](found["forget"], found["target"])
    assert float(metrics["forget"]) == pytest.approx(wanted, rel=RTOL)
    assert float(loss) == pytest.approx(0.6 * wanted, rel=RTOL)
    assert float(metrics["retained"]) == 0.0


@pytest.mark.parametrize("retain", RETAIN)
def test_what_keeps_the_rest_is_weighed_and_added(retain):
    settings = dataclasses.replace(SETTINGS, retain=retain)
    loss, metrics = value("ga", settings, batch_of("ga"))
    found = groups()
    wanted = RETAIN[retain](found["retain"], found["reasoning"])
    assert float(metrics["retained"]) == pytest.approx(wanted, rel=RTOL, abs=1e-12)
    total = 0.6 * ascent(found["forget"], None) + 0.8 * wanted
    assert float(loss) == pytest.approx(total, rel=RTOL)


@pytest.mark.parametrize("retain", ["nll", "kl", "hidden"])
def test_a_group_that_a_run_lacks_is_no_part_of_the_mean(retain):
    settings = dataclasses.replace(SETTINGS, retain=retain)
    group = groups()["retain"]
    _, metrics = value("ga", settings, batch_of("ga", retain=("retain",)))
    wanted = {"nll": group.nll, "kl": group.kl, "hidden": matched(group)}[retain]
    assert float(metrics["retained"]) == pytest.approx(wanted, rel=RTOL)
    _, metrics = value("ga", settings, batch_of("ga", retain=()))
    assert float(metrics["retained"]) == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_what_padding_holds_has_no_influence_at_all(name):
    retain = {"pdu": "kl", "ceu": "kd", "npo": "hidden"}.get(name, "own")
    settings = dataclasses.replace(SETTINGS, beta=BETA, retain=retain)
    plain, _ = value(name, settings, batch_of(name))
    noisy, _ = value(name, settings, batch_of(name, pad_id=39), Spoilt)
    assert np.isfinite(plain)
    assert float(noisy) == float(plain)


# ---- the registry


def test_every_method_is_registered():
    assert set(ALL) <= set(METHODS)
    for name, method in METHODS.items():
        assert (method.name, bool(method.about)) == (name, True)
        assert (method.loss is not None) == (method.loop == "fixed")
    assert [name for name in ALL if METHODS[name].loop == "iterative"] == ["cipo", "cipo_simpo"]
    assert METHODS["retrain"].loop == "none"


def test_what_each_method_learns_from():
    assert {name: METHODS[name].target for name in LOSSES if METHODS[name].target} == {
        "direct_idk": "idk", "answer_idk": "idk_answer", "reasoned_idk": "refusal",
        "idk_dpo": "idk", "altpo": "alternates", "r2mu": "own", "tru": "refusal",
        "kd": "counterfactual",
    }  # fmt: skip
    assert {n for n in ALL if METHODS[n].reference == "logps"} == {"npo", "idk_dpo", "altpo"}
    assert {n for n in ALL if METHODS[n].part} == {"rmu", "r2mu"}
    assert {n for n in ALL if METHODS[n].dual} == {"pdu"}


def test_the_model_that_came_in_is_kept_only_where_it_is_needed():
    def refer(config):
        return {name for name in LOSSES if METHODS[name].refers(config)}

    needed = {"rmu", "r2mu", "undial", "kd"}
    assert refer(BaselineConfig()) == needed | {"kl"}
    assert refer(BaselineConfig(retain="nll")) == needed
    assert refer(BaselineConfig(retain="none")) == needed
    for retain in ("kl", "kd", "hidden"):
        assert refer(BaselineConfig(retain=retain)) == set(LOSSES)


def test_the_defaults_are_those_of_the_papers():
    def found(name):
        s = METHODS[name].settings(BaselineConfig())
        return s.beta, s.forget_weight, s.retain_weight, s.retain

    assert found("ga") == (0.1, 1.0, 1.0, "none")
    assert found("grad_diff") == (0.1, 1.0, 1.0, "nll")
    assert found("kl")[3] == "kl"
    assert found("npo") == (0.1, 1.0, 1.0, "nll")
    assert found("simnpo") == (4.5, 0.125, 1.0, "nll")
    assert found("wga")[0] == 1.0
    assert found("satimp")[0] == 5.0 and BaselineConfig().importance == 1.0
    assert found("undial")[0] == 10.0
    assert found("tru")[2] == pytest.approx(BaselineConfig().alpha)
    for name in ("rmu", "r2mu"):
        assert found(name)[2:] == (1.4, "hidden")
    assert found("kd")[3] == "kd"


def test_defaults_never_beat_what_a_user_set():
    given = BaselineConfig(beta=0.7, forget_weight=2.0, retain_weight=3.0, retain="kl")
    for name in LOSSES:
        assert METHODS[name].settings(given) == given
    assert METHODS["simnpo"].settings(BaselineConfig(beta=0.7)).forget_weight == 0.125


def test_overrides_never_beat_what_a_user_set():
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
    sides = [collate(ROWS[group], SHAPE) for group in ("target", "forget")]
    pairs = jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *sides)
    batch = {"pairs": pairs, "ref": np.stack([REFS["ref_target"], REFS["ref_forget"]], axis=1)}

    def at(beta):
        objective = preference_objective(CipoConfig(loss=loss, beta=beta))
        return float(objective(Quick(CONFIG, COMPUTE), PARAMS, batch)[0])

    assert at(0.0) == at(beta) != at(beta + 0.1)


def test_equal_settings_are_one_objective():
    one = objective_of("npo", BaselineConfig(beta=0.2))
    assert objective_of("npo", BaselineConfig(beta=0.2)) is one
    assert objective_of("npo", BaselineConfig(beta=0.3)) is not one
    assert objective_of("wga", BaselineConfig(beta=0.2)) is not one


# ---- PDU's dual variable, and the reference of the update


def test_the_dual_variable_follows_what_is_retained(one_device, tmp_path):
    settings = BaselineConfig(retain_weight=0.9, epsilon=0.03, dual_lr=10.0, retain="kl")
    assert carried_of("ga", settings) is None
    trainer = Trainer(
        Policy(CONFIG, COMPUTE), objective_of("pdu", settings), optax.sgd(0.5), one_device,
        refers=True, carried=carried_of("pdu", settings),
    )  # fmt: skip
    update, state = trainer.make_update(), trainer.init(PARAMS)
    frozen, batch = jax.device_put(PARAMS), trainer.put(batch_of("pdu", ("retain",)))
    duals, checkpoints = [0.9], Checkpoints(tmp_path)
    for step in range(2):
        state, metrics = update(state, frozen, batch)
        metrics = {k: float(v) for k, v in metrics.items()}
        # The weight of a step is the dual variable from before it.
        assert metrics["dual"] == pytest.approx(duals[-1], rel=1e-5)
        total = metrics["forget"] + duals[-1] * metrics["retained"]
        assert metrics["loss"] == pytest.approx(total, rel=1e-5)
        if step == 0:  # The model is its own reference still.
            assert metrics["retained"] == pytest.approx(0.0, abs=1e-6)
        duals.append(max(duals[-1] + 10.0 * (metrics["retained"] - 0.03), 0.0))
        assert float(state["carried"]["dual"]) == pytest.approx(duals[-1], rel=1e-5)
        if step == 0:  # A run that is stopped here goes on from the same state.
            checkpoints.save_step("pdu", 1, state)
            restored = checkpoints.load_step("pdu", 1, trainer.abstract_state())
            assert_trees_equal(restored, state)
            state = restored
    assert duals[0] > duals[1] > 0.0 and duals[2] > duals[1]
    assert update._cache_size() == 1


def test_the_dual_variable_goes_on_from_round_to_round(tmp_path):
    settings = BaselineConfig(retain_weight=0.9, epsilon=0.3, dual_lr=0.5)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "phase": "iteration-01", "dual": 0.9, "retained": 0.1}\n'
        '{"step": 2, "phase": "iteration-01", "dual": 0.8, "retained": 0.7}\n'
        '{"step": 3, "phase": "iteration-02", "dual": 1.0, "retained": 0.0}\n'
    )
    engine = SimpleNamespace(
        config=Config(method="pdu", baseline=settings),
        log=MetricsLog(SimpleNamespace(path=tmp_path)),
    )
    run = BaselineRun(engine, materials=object())
    assert run._carried(1).start == {"dual": 0.9}
    # Where the last step's ascent led: 0.8 + 0.5 (0.7 - 0.3), and 1.0 + 0.5 (0.0 - 0.3).
    assert run._carried(2).start["dual"] == pytest.approx(1.0, rel=1e-6)
    assert run._carried(3).start["dual"] == pytest.approx(0.85, rel=1e-6)
    engine.config = Config(method="npo", baseline=settings)
    assert run._carried(2) is None


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
    config = Config(method=name, baseline=BaselineConfig(layer=8))
    with pytest.raises(UserError, match=r"config\.baseline\.layer = 8: .* layers 0 to 7"):
        methods.check(config, EIGHT)
    methods.check(Config(method=name), EIGHT)
    methods.check(Config(method="ga"), CONFIG)  # It never looks at layer 7.
    hidden = Config(method="ga", baseline=BaselineConfig(retain="hidden"))
    with pytest.raises(UserError, match=r"config\.baseline\.layer = 7: .* layers 0 to 1"):
        methods.check(hidden, CONFIG)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (5, 6, 7)),
        ({"layer": 1}, (0, 1)),
        ({"layer": 4}, (2, 3, 4)),
        ({"layers": "0,6"}, (0, 6)),
    ],
)
def test_rmu_trains_the_layers_that_it_is_told(changes, layers):
    config = Config(method="rmu", baseline=BaselineConfig(**changes))
    assert part_of(config, EIGHT) == ParamSubset(layers, ("down_proj",))


def test_what_cannot_stand_beside_adapters_is_refused(tmp_path):
    lora = LoraConfig(rank=4)
    for name in ("rmu", "r2mu"):
        with pytest.raises(UserError, match=rf"config\.lora\.rank: {name} trains layers"):
            part_of(Config(method=name, lora=lora), EIGHT)
    assert part_of(Config(method="kl", lora=lora), EIGHT).rank == 4
    assert part_of(Config(method="kl"), EIGHT) is None
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}'
    )
    given = LoraConfig(path=str(tmp_path))
    with pytest.raises(UserError, match=r"config\.lora\.path: kl compares with the model"):
        part_of(Config(method="kl", lora=given), EIGHT)
    assert part_of(Config(method="grad_diff", lora=given), EIGHT).rank == 4
