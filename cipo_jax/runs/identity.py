"""Fingerprints: short digests by which a stage knows what it was made from."""

import dataclasses
import hashlib
import inspect
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from cipo_jax.typing import Array

F = TypeVar("F", bound=Callable[..., object])
_DIGITS = 16
_VERSION = "stage_version"  # the attribute of a stage function


@runtime_checkable
class Identified(Protocol):
    """A value that knows its own fingerprint, such as the weights of a stage."""

    @property
    def fingerprint(self) -> str: ...


def fingerprint(value: object) -> str:
    """A digest of a value's content.

    Args:
      value: anything made of dataclasses, named tuples, mappings, sequences, arrays of integers,
        strings, numbers and None. An object with an attribute `fingerprint` answers for itself.

    Raises:
      TypeError: for any other object: its identity would not survive the process.
    """
    if isinstance(value, Identified):
        return value.fingerprint
    text = json.dumps(_plain(value), ensure_ascii=False, sort_keys=True)
    return digest(text)


def digest(text: str) -> str:
    """A short SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]


def _plain(value: object) -> Any:
    """The JSON value that stands for an object."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Identified):
        return value.fingerprint
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {type(value).__name__: fields}
    if isinstance(value, np.integer | np.floating):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(_plain(v) for v in value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        if all(type(v) is int for v in value):  # Token ids: by far the most there are.
            return list(value)
        return [_plain(v) for v in value]
    raise TypeError(f"a {type(value).__name__} has no fingerprint")


def stage_version(version: int) -> Callable[[F], F]:
    """Sets the version of a stage function; raise it when the function computes something else."""

    def mark(function: F) -> F:
        setattr(function, _VERSION, version)
        return function

    return mark


def function_identity(function: Callable[..., object]) -> str:
    """Name and version of a stage function."""
    return f"{function.__name__}@{getattr(function, _VERSION, 1)}"


def input_names(function: Callable[..., object], count: int) -> list[str]:
    """Names of a stage function's inputs: its parameters behind the run."""
    names = list(inspect.signature(function).parameters)[1:]
    if len(names) != count:
        raise TypeError(f"{function.__name__} takes the inputs {names}, and was given {count}")
    return names


def derive_key(seed: int, *names: str | int) -> Array:
    """A PRNG key for a named place in the run, independent of what was drawn before."""
    key = jax.random.key(seed)
    for name in names:
        number = name if isinstance(name, int) else zlib.crc32(name.encode())
        key = jax.random.fold_in(key, number)
    return key


def derive_seed(seed: int, phase: int, stream: int) -> int:
    """A seed for one stream of one phase, as a function of the run's seed alone."""
    return int(np.random.SeedSequence((seed, phase, stream)).generate_state(1)[0])
