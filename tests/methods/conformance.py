"""The conformance battery: what the update of every method has to fulfill.

    check_conformance(METHODS["my_method"])

compiles three updates and a forward pass of a small random model, and holds all of them to the same
gradient: on one device, on a mesh of eight, in micro-batches, with adapters, with other padding. An
objective that belongs to no `FixedTarget` is checked by `check_objective`.
"""

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_options import QUICK
from trees import assert_trees_close, assert_trees_equal

from cipo_jax.config import Config
from cipo_jax.data.batches import PadShape, TokenizedExample, collate, collate_pairs
from cipo_jax.errors import UserError
from cipo_jax.methods.base import Method
from cipo_jax.methods.cipo.algorithm import Cipo
from cipo_jax.methods.cipo.config import CipoConfig
from cipo_jax.methods.cipo.objective import PreferenceObjective, WarmupObjective
from cipo_jax.methods.fixed_target import FixedTarget, FixedTargetConfig
from cipo_jax.methods.representation import RepresentationConfig
from cipo_jax.models.decoder import Compute, DecoderConfig, abstract_params, merged
from cipo_jax.models.trainable import Trainable, abstract_trainable, assemble
from cipo_jax.runs.memory import compilation_count
from cipo_jax.shared_config import LoraConfig, RunConfig
from cipo_jax.training.checkpoints import Checkpoints
from cipo_jax.training.loop import Callbacks, Phase, train_phase
from cipo_jax.training.mesh import make_mesh
from cipo_jax.training.objective import Objective, StepContext
from cipo_jax.training.optimizer import AdamW, Schedule
from cipo_jax.training.policy import Policy
from cipo_jax.training.step import PhaseResult, TrainStep

DECODER = DecoderConfig(
    vocab_size=40, d_model=16, d_ff=24, layers=2, heads=4, kv_heads=2, head_dim=4, tied_head=True
)
COMPUTE = Compute(remat="none", logits_chunk=7)  # The chunk divides nothing.
LORA = LoraConfig(rank=2, alpha=4.0)
WIDE, NARROW = PadShape(24, 16), PadShape(16, 12)
ROWS = 8  # In two micro-batches each row of a mesh of 2 x 2 x 2 gets one.
# The halves of a batch have equally many tokens, so that a mean over tokens, too, is the mean of
# those of its halves. Micro-batches, which take every second or fourth row, have not: their divisor
# matters.
LENGTHS = (12, 1, 7, 5, 9, 2, 12, 2)

# Sums of a few hundred float32 numbers in another order, relative to the largest of a gradient.
GRADIENT_RTOL = 2e-5
# Metrics are means of sums of some 50 nats that may cancel.
METRIC_RTOL, METRIC_ATOL = 1e-4, 1e-3
# bfloat16 rounds each number at 2^-9; two layers and a head add up a few of these.
BFLOAT16_RTOL = 0.05

# The optimizer does not clip, so that its first moment is (1 - b1) times the gradient.
OPTIMIZER = AdamW(b1=0.5, max_grad_norm=0.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective and what goes with it.

    Attributes:
      objective: what is minimized.
      groups: of its batch: "forget", "target", "retain", "reasoning", "chosen", "pairs".
      part: a part of the model that it can train alone: adapters, or the method's own subset.
      mean_of_parts: whether the loss of a batch is the mean of its halves' losses.
    """

    objective: Objective
    groups: tuple[str, ...]
    part: Trainable
    mean_of_parts: bool = True


# ---- what is checked


def check_conformance(
    method: Method, config: RunConfig | None = None, mean_of_parts: bool = True
) -> None:
    """Holds a method to every property that the engine relies on.

    Args:
      method: a `FixedTarget`, or CiPO; another method's objectives go to `check_objective`.
      config: settings; by default those of `small_config`.
      mean_of_parts: False for a loss that compares the rows of a batch with each other.

    Raises:
      AssertionError: naming the property that does not hold.
    """
    for case in cases(method, config or small_config(), mean_of_parts):
        check_objective(case)


def small_config(**groups: object) -> Config:
    """The defaults, but for layers that the small model has."""
    given = {
        "representation": RepresentationConfig(layer=1),
        "fixed_target": FixedTargetConfig(layer=1),
    }
    return Config(**given | groups)  # pyright: ignore[reportArgumentType]


def cases(method: Method, config: RunConfig, mean_of_parts: bool = True) -> list[Case]:
    """The objectives of a method."""
    config = method.configured(config)
    part = trained_part(method, config)
    if isinstance(method, Cipo):
        settings = config.group(CipoConfig)
        warmup = WarmupObjective(settings.retain_weight)
        return [
            Case(warmup, ("chosen", "retain"), part, mean_of_parts),
            Case(
                PreferenceObjective.from_config(settings), ("pairs", "retain"), part, mean_of_parts
            ),
        ]
    assert isinstance(method, FixedTarget), f"{method.name}: use check_objective"
    objective = method.objective(config)
    groups = ["forget", *(["target"] if method.targets else [])]
    groups += ["retain"] if objective.retain.uses_data else []
    return [Case(objective, tuple(groups), part, mean_of_parts)]


def trained_part(method: Method, config: RunConfig) -> Trainable:
    """Adapters; where a method refuses them in one line, the subset that it trains instead."""
    try:
        return method.trainable(dataclasses.replace(config, lora=LORA), DECODER)
    except UserError as refused:
        assert str(refused).startswith("config.lora.") and "\n" not in str(refused)
        part = method.trainable(config, DECODER)
        assert part is not None, f"{method.name} refuses adapters and trains all parameters"
        return part


@functools.cache  # Methods with equal objectives differ in their data alone.
def check_objective(case: Case) -> None:
    """Holds an objective to every property; see `check_conformance`."""
    step = train_step(case)
    plain = first_step(case, step, batch(case))
    for check in (
        finite_and_nonzero,
        content_of_padding,
        order_of_rows,
        mean_of_halves,
        one_compilation,
        resume,
        mesh_and_micro_batches,
        part_and_micro_batches,
        bfloat16,
    ):
        try:
            check(case, step, plain)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}, {case.objective}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The gradient and the metrics of one update."""

    gradient: dict
    metrics: dict[str, float]


def finite_and_nonzero(case: Case, step: TrainStep, plain: Outcome) -> None:
    leaves = jax.tree.leaves(plain.gradient)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert largest(plain) > 0.0
    assert all(np.isfinite(value) for value in plain.metrics.values())
    assert {"loss", "grad_norm"} < set(plain.metrics)


def content_of_padding(case: Case, step: TrainStep, plain: Outcome) -> None:
    """Other ids, and garbage in place of log-probabilities and hidden states."""
    spoilt = first_step(case, step, batch(case, spoilt=True))
    assert spoilt.metrics["loss"] == plain.metrics["loss"]
    same(spoilt, plain)


def order_of_rows(case: Case, step: TrainStep, plain: Outcome) -> None:
    same(first_step(case, step, batch(case, (3, 6, 0, 2, 7, 5, 1, 4))), plain)


def mean_of_halves(case: Case, step: TrainStep, plain: Outcome) -> None:
    """Each half twice, so that it has the same shape."""
    if not case.mean_of_parts:
        return
    halves = [(*half, *half) for half in ((0, 1, 2, 3), (4, 5, 6, 7))]
    a, b = (first_step(case, step, batch(case, half)) for half in halves)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, a.gradient, b.gradient)
    loss = (a.metrics["loss"] + b.metrics["loss"]) / 2
    assert loss == pytest.approx(plain.metrics["loss"], rel=METRIC_RTOL, abs=1e-5)
    assert_trees_close(mean, plain.gradient, atol=GRADIENT_RTOL * largest(plain))
    assert largest(a) != largest(b)


def one_compilation(case: Case, step: TrainStep, plain: Outcome) -> None:
    """Of all steps, learning rates, lengths of phases, and equal steps made anew."""
    compiled = compilation_count()
    again = train_step(dataclasses.replace(case))
    assert again is not step and (again, hash(again)) == (step, hash(step))
    for made, schedule in ((step, Schedule(0, 0.1, 3, 50)), (again, Schedule(0, 1e-3, 0, 2))):
        state = made.init(PARAMS, schedule=schedule)
        for number in range(2):
            state, _ = made(state, made.put(batch(case, rolled(number))), frozen(made))
    assert compilation_count() == compiled


def resume(case: Case, step: TrainStep, plain: Outcome) -> None:
    """A phase that is stopped after two of three steps ends in the bits of one that is not."""
    phase = Phase("phase", step, Schedule(0, 0.01, 1, 3), 3, 50)

    def run(folder: str, stop_at: int = 0) -> PhaseResult | None:
        done = []
        stop = Callbacks(
            on_step=lambda number, _: done.append(number),
            should_stop=lambda: len(done) + 1 == stop_at,  # The last step is reported one later.
        )
        start, at = PhaseResult(PARAMS), lambda number: batch(case, rolled(number))
        return train_phase(phase, start, at, Checkpoints(folder), stop, frozen(step))

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        whole = run(one)
        assert run(two, stop_at=2) is None
        assert Checkpoints(two).latest_step("phase") == 2
        assert_trees_equal(run(two), whole)


def mesh_and_micro_batches(case: Case, step: TrainStep, plain: Outcome) -> None:
    """Eight devices, 2 x 2 x 2, in two micro-batches."""
    on_mesh = train_step(case, (2, 2, 2), 2)
    same(first_step(case, on_mesh, batch(case)), plain)


def part_and_micro_batches(case: Case, step: TrainStep, plain: Outcome) -> None:
    """Adapters or the method's subset, in four micro-batches with less padding.

    By the chain rule their gradient follows from that of the parameters that they make.
    """
    beside = train_step(case, accumulation=4, part=case.part)
    base, part = frozen(step), initial_part(case.part)
    params, pull = jax.vjp(lambda part: merged(assemble(case.part, base, part)), part)
    whole = first_step(case, step, batch(case), params)
    (wanted,) = pull(whole.gradient)
    found = first_step(case, beside, batch(case, shape=NARROW), part)
    norm = float(np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(wanted))))
    metrics = whole.metrics | {"grad_norm": norm}
    same(found, Outcome(jax.tree.map(np.asarray, wanted), metrics))
    assert any(np.abs(leaf).max() > 0.0 for leaf in jax.tree.leaves(found.gradient))


def bfloat16(case: Case, step: TrainStep, plain: Outcome) -> None:
    policy = Spoilable(DECODER, dataclasses.replace(COMPUTE, dtype="bfloat16"))

    @jax.jit(compiler_options=QUICK)
    def value(params, reference, rows):
        aux_state = {k: jnp.float32(v) for k, v in case.objective.initial_aux_state().items()}
        return case.objective(policy, params, rows, StepContext(reference, aux_state))

    reference = None
    if case.objective.needs_reference_params:
        reference = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), REFERENCE)
    loss, _ = value(PARAMS, reference, batch(case))
    assert loss.dtype == jnp.float32
    wanted = plain.metrics["loss"]
    assert float(loss) == pytest.approx(wanted, rel=BFLOAT16_RTOL, abs=BFLOAT16_RTOL)


# ---- what it is checked on


def _random_params(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), abstract_params(DECODER)
    )


PARAMS, REFERENCE = _random_params(0), _random_params(1)


def initial_part(part: Trainable):
    """Values of a part, all of them random, so that no gradient is zero."""
    rng = np.random.default_rng(2)
    shapes = abstract_trainable(DECODER, part)
    return jax.tree.map(lambda x: rng.normal(0.0, 0.3, x.shape).astype(np.float32), shapes)


def _examples(seed):
    rng = np.random.default_rng((3, seed))
    return [
        TokenizedExample(rng.integers(0, 40, rng.integers(1, 5)), rng.integers(0, 40, length))
        for length in LENGTHS
    ]


_GROUPS = ("forget", "target", "retain", "reasoning", "chosen", "rejected")
_EXAMPLES = {group: _examples(number) for number, group in enumerate(_GROUPS)}
_REFS = np.random.default_rng(4).normal(-30.0, 5.0, (ROWS, 2)).astype(np.float32)
_WEIGHTS = np.array([1.0, 0.0, 1.0, 0.5, 1.0, 1.0, 0.0, 1.0], np.float32)


def rolled(number: int) -> tuple[int, ...]:
    """The rows of the batch of a step."""
    return tuple((row + number) % ROWS for row in range(ROWS))


def batch(case: Case, rows=tuple(range(ROWS)), shape=WIDE, spoilt=False):
    """What an objective gets.

    Args:
      case: which groups.
      rows: which rows, in order.
      shape: padded sizes.
      spoilt: whether padding holds other ids, of which `Spoilable` makes garbage.
    """

    def picked(group):
        return [_EXAMPLES[group][row] for row in rows]

    def spoil(group):
        if not spoilt:
            return group
        pad = ~group.mask
        return group._replace(completions=np.where(pad, DECODER.vocab_size, group.completions))

    pad_id = 39 if spoilt else 0
    found = {}
    for group in case.groups:
        if group == "pairs":
            pairs = collate_pairs(picked("chosen"), picked("rejected"), shape, pad_id)
            found |= {"pairs": spoil(pairs), "weights": _WEIGHTS[list(rows)]}
            if getattr(case.objective, "loss", None) != "simpo":
                found["ref"] = _REFS[list(rows)]
        else:
            found[group] = spoil(collate(picked(group), shape, pad_id))
    if getattr(getattr(case.objective, "forget", None), "needs_reference_logps", False):
        sides = [group for group in ("forget", "target") if group in case.groups]
        found |= {f"ref_{s}": _REFS[list(rows), i] for i, s in enumerate(sides)}
    return found


# Jitted, so that JAX traces and differentiates the model once for all methods.
_states = jax.jit(Policy.completion_states, static_argnums=0)
_layer_states = jax.jit(Policy.layer_states, static_argnums=(0, 3))
_logps = jax.jit(Policy.completion_logps, static_argnums=0)


class Spoilable(Policy):
    """Gives garbage where a completion holds an id that there is not: see `batch`."""

    @property
    def plain(self) -> Policy:
        return Policy(self.config, self.compute)

    def completion_states(self, params, sequences):
        # No NaN: the gradient of the head is a product with these states, and 0 times NaN is NaN.
        known = (sequences.completions < DECODER.vocab_size)[..., None]
        return jnp.where(known, _states(self.plain, params, sequences), 100.0)

    def layer_states(self, params, sequences, layer):
        known = (sequences.completions < DECODER.vocab_size)[..., None]
        return jnp.where(known, _layer_states(self.plain, params, sequences, layer), jnp.nan)

    def completion_logps(self, params, sequences):
        known = sequences.completions < DECODER.vocab_size
        ids = jnp.where(known, sequences.completions, 0)
        logps = _logps(self.plain, params, sequences._replace(completions=ids))
        return jnp.where(known, logps, jnp.nan)


def train_step(
    case: Case,
    layout: tuple[int, int, int] = (1, 1, 1),
    accumulation: int = 1,
    part: Trainable = None,
) -> TrainStep:
    """The update of a case on a mesh of data x fsdp x tensor."""
    mesh = make_mesh(*layout, devices=jax.devices()[: int(np.prod(layout))])
    policy = Spoilable(DECODER, COMPUTE)
    return TrainStep(policy, case.objective, OPTIMIZER, mesh, part, accumulation)


def first_step(case: Case, step: TrainStep, rows, params=None) -> Outcome:
    """One update of parameters, `PARAMS` by default."""
    state = step.init(PARAMS if params is None else params, schedule=Schedule(lr=1e-3))
    state, metrics = step(state, step.put(rows), frozen(step))
    share = 1.0 - OPTIMIZER.b1
    gradient = jax.tree.map(lambda mu: np.asarray(mu) / share, state.opt_state.moments.mu)
    return Outcome(gradient, {name: float(value) for name, value in metrics.items()})


@functools.lru_cache(4)
def frozen(step: TrainStep):
    """The base parameters, which are the reference as well, on the devices of a step."""
    whole = dataclasses.replace(step, trainable=None).abstract_trainable()
    return jax.device_put(REFERENCE, jax.tree.map(lambda x: x.sharding, whole))


def largest(outcome: Outcome) -> float:
    """The largest number of a gradient."""
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(outcome.gradient))


def same(found: Outcome, wanted: Outcome) -> None:
    """The same update, but for rounding."""
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        near = pytest.approx(value, rel=METRIC_RTOL, abs=METRIC_ATOL)
        assert found.metrics[name] == near, name
    loss = pytest.approx(wanted.metrics["loss"], rel=METRIC_RTOL / 2, abs=1e-5)
    assert found.metrics["loss"] == loss
    assert_trees_close(found.gradient, wanted.gradient, atol=GRADIENT_RTOL * largest(wanted))
