"""Runs without a model, and stages that count how often they are made."""

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

from cipo_jax.config import Config
from cipo_jax.data.records import Record, field
from cipo_jax.progress import Reporter
from cipo_jax.runs.context import Run
from cipo_jax.runs.results import StageResult, rows


@dataclasses.dataclass(frozen=True)
class Text(Record):
    """A row of a stage."""

    schema: ClassVar[str] = "text"

    item: int = field("its number")
    text: str = field("any text")


@dataclasses.dataclass(frozen=True)
class Made(StageResult):
    """The result of a stage that has no file."""

    schema: ClassVar[str] = "made"

    made: int = field("how often the stage has been made")


@dataclasses.dataclass(frozen=True)
class Texts(StageResult):
    """The result of a stage that has a file."""

    schema: ClassVar[str] = "texts"

    made: int = field("how often the stage has been made")
    texts: tuple[Text, ...] = rows("one an item")


def open_run(folder, config=None, *, parent=None, claim=True, workspace=None):
    """A run of `config` whose stages need no model."""
    workspace = workspace or SimpleNamespace()
    return Run.open(config or Config(), folder, workspace, Reporter(quiet=True), parent, claim)


class Counter:
    """Stage functions that count how often they are made, in `made`."""

    def __init__(self):
        self.made = 0

    @property
    def plain(self):
        def make(run: Run, source: str) -> Made:
            self.made += 1
            return Made(self.made)

        return make

    @property
    def with_file(self):
        def make_texts(run: Run, source: str) -> Texts:
            self.made += 1
            return Texts(self.made, (Text(0, source),))

        return make_texts

    @property
    def of_two(self):
        def combine(run: Run, first: Made, second: Made) -> Made:
            self.made += 1
            return Made(self.made)

        return combine


def _named(name):
    """Gives a stage function the name of another one, since its name is part of its identity."""

    def rename(function):
        function.__name__ = name
        return function

    return rename


@_named("make")
def fails(run: Run, source: str) -> Made:
    """In place of `Counter.plain`, in a process that dies in it."""
    raise RuntimeError("power cut")


@_named("make")
def never(run: Run, source: str) -> Made:
    """In place of `Counter.plain`, where it is not to be called."""
    raise AssertionError("made again")
