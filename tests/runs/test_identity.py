"""Fingerprints of stage inputs, and addressed randomness."""

import dataclasses
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cipo_jax.config import Config, CounterfactualConfig
from cipo_jax.data.examples import Example
from cipo_jax.evals.evaluate import Question
from cipo_jax.runs.data import ForgetSet, QuestionSet, RetainedExamples
from cipo_jax.runs.identity import (
    derive_key,
    derive_seed,
    digest,
    fingerprint,
    function_identity,
    input_names,
    stage_version,
)
from cipo_jax.runs.ledger import StageIdentity
from cipo_jax.runs.weights import Weights


class Point(NamedTuple):
    x: int
    y: float


@dataclasses.dataclass(frozen=True)
class Place:
    name: str
    at: Point | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Town:
    name: str
    at: Point | None = None
    notes: tuple[str, ...] = ()


class Known:
    """A value that knows its own fingerprint, and holds what has none."""

    def __init__(self, print_):
        self.fingerprint, self.anything = print_, object()


VALUES = [
    None, True, False, 0, 1, -1, 2**70, 0.0, -0.0, 1.0, 0.1, 1e300, float("inf"), "", "1",
    "é\u2028", "\ud800", (), (1,), (1, 2), (2, 1), ((1,), 2), (1.0,), (True,), ("1",), (None,), {},
    {"a": 1}, {"a": 2}, {"b": 1}, frozenset({"a"}), Place("a"), Place("b"), Town("a"),
    Place("a", Point(1, 2.0)), Place("a", Point(1, 2.5)), Place("a", notes=("a",)),
    np.arange(3), np.arange(4).reshape(2, 2),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_a_fingerprint_is_short_and_the_same_again(value):
    found = fingerprint(value)
    assert len(found) == 16 and set(found) <= set("0123456789abcdef")
    assert fingerprint(value) == found


def test_other_values_have_other_fingerprints():
    prints = [fingerprint(value) for value in VALUES]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2], (1, 2)),  # As JSON has them: what was read is what was written.
        (range(3), [0, 1, 2]),
        (np.array([0, 1, 2], np.int32), [0, 1, 2]),
        (np.int64(3), 3),
        (np.float64(0.1), 0.1),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (OrderedDict(b=2, a=1), {"a": 1, "b": 2}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (frozenset("abc"), set("cba")),
        (Point(1, 2.0), [1, 2.0]),
        ([np.int32(1), 2], [1, 2]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_equal_contents_have_equal_fingerprints(one, other):
    assert fingerprint(one) == fingerprint(other)


def test_a_value_that_knows_its_fingerprint_answers_for_itself():
    assert fingerprint(Known("abc")) == "abc"
    assert fingerprint((Known("abc"), 1)) == fingerprint((Known("abc"), 1))
    assert fingerprint((Known("abc"), 1)) != fingerprint((Known("abd"), 1))
    # Weights are what they were made from, wherever they are kept.
    assert fingerprint(Weights("warmup", "abc", 3)) == "abc"


def test_data_of_a_run_have_fingerprints():
    def question(text, ids=(1, 2)):
        return Question("forget", Example(text, "Lisbon", facts=("baker",)), ids)

    one = QuestionSet((question("Where?"),), frozenset({"a", "b"}))
    assert one.fingerprint == QuestionSet((question("Where?"),), frozenset({"b", "a"})).fingerprint
    others = [
        QuestionSet((question("Who?"),), one.words),
        QuestionSet((question("Where?", (1, 3)),), one.words),
        QuestionSet((question("Where?")._replace(split="retain"),), one.words),
        QuestionSet((), one.words),
        QuestionSet(one.questions, frozenset({"a"})),
    ]
    assert len({one.fingerprint, *(o.fingerprint for o in others)}) == 6
    assert fingerprint(one) == one.fingerprint
    assert ForgetSet(one.questions).fingerprint != ForgetSet(others[0].questions).fingerprint
    assert RetainedExamples((), ()).fingerprint == RetainedExamples((), ()).fingerprint


def test_every_config_has_a_fingerprint():
    assert fingerprint(Config()) == fingerprint(Config())
    assert fingerprint(Config()) != fingerprint(Config(seed=1))
    assert fingerprint(CounterfactualConfig()) != fingerprint(CounterfactualConfig(min_gain=0.25))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (object(), "object"),
        (Path("a"), "Path"),
        (len, "builtin_function_or_method"),
        (lambda: 1, "function"),
        ((i for i in range(3)), "generator"),
        (Place, "type"),
        (np.bool_(True), "bool"),
        (1j, "complex"),
        (b"abc", "bytes"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
@pytest.mark.parametrize("inside", [False, True])
def test_any_other_value_has_none(value, name, inside):
    value = Place("a", notes=({"k": [value]},)) if inside else value
    with pytest.raises(TypeError, match=f"a .*{name}.* has no fingerprint"):
        fingerprint(value)


def test_arrays_on_devices_have_none():
    with pytest.raises(TypeError, match="has no fingerprint"):
        fingerprint(jnp.arange(3))


def test_fingerprints_do_not_depend_on_the_process():
    """Texts hash to other numbers in each process, which orders sets."""
    code = (
        "from cipo_jax.runs.identity import fingerprint; "
        "print(fingerprint([{'b': 1, 'a': frozenset('abcdefgh')}, 0.1, None]))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert printed.stdout.strip() == fingerprint(
        [{"b": 1, "a": frozenset("abcdefgh")}, 0.1, None]
    ), printed.stderr


# ---- stage functions


def test_a_stage_function_is_known_by_name_and_version():
    def make(run, weights, data):
        raise AssertionError

    assert function_identity(make) == "make@1"
    assert function_identity(stage_version(3)(make)) == "make@3"
    assert input_names(make, 2) == ["weights", "data"]
    with pytest.raises(TypeError, match="make takes the inputs"):
        input_names(make, 1)


def test_a_stage_is_its_function_and_its_inputs_by_name():
    def identity(function="make@1", **inputs: str):
        return StageIdentity(function, inputs)

    one = identity(a="1", b="2")
    assert one.fingerprint == identity(b="2", a="1").fingerprint
    others = [identity(a="2", b="1"), identity("make@2", a="1", b="2"), identity(a="1"), identity()]
    assert len({one.fingerprint, *(o.fingerprint for o in others)}) == 5
    assert isinstance(one.inputs, Mapping)


# ---- randomness


def test_keys_are_addressed_by_seed_and_names():
    def data(*address):
        return tuple(np.asarray(jax.random.key_data(derive_key(*address))).tolist())

    assert data(0, "rollouts", 1) == data(0, "rollouts", 1)
    addresses = [(0, "rollouts", 1), (0, "rollouts", 2), (0, "targets", 1), (1, "rollouts", 1),
                 (0,), (0, "rollouts"), (0, 1, "rollouts")]  # fmt: skip
    assert len({data(*address) for address in addresses}) == len(addresses)


def test_seeds_are_addressed_by_seed_phase_and_stream():
    addresses = [(s, p, t) for s in range(3) for p in range(3) for t in range(3)]
    assert len({derive_seed(*address) for address in addresses}) == len(addresses)
    assert derive_seed(0, 1, 2) == derive_seed(0, 1, 2)


def test_a_digest_takes_any_text():
    assert len(digest("\ud800")) == 16
    assert digest("a") != digest("b")
