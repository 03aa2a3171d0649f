"""Every stage result of the package comes back from the run folder as it was."""

import dataclasses
import importlib
import json
import pkgutil
import types
import typing
from typing import Any, Literal

import pytest
from small_run import Made, Text, Texts

import cipo_jax
from cipo_jax.data.records import read_record, write_record
from cipo_jax.errors import UserError
from cipo_jax.experiments.sequential import Rehearsal
from cipo_jax.reports.summary import Summary
from cipo_jax.runs.evaluation import Exported
from cipo_jax.runs.identity import fingerprint
from cipo_jax.runs.results import StageResult, result_class
from cipo_jax.runs.weights import Weights


def _package_results() -> list[type[StageResult]]:
    """All classes of stage results that the package defines."""
    for module in pkgutil.walk_packages(cipo_jax.__path__, "cipo_jax."):
        if module.name != "cipo_jax.__main__":
            importlib.import_module(module.name)
    found, todo = [], [StageResult]
    while todo:
        subclasses = todo.pop().__subclasses__()
        found += [cls for cls in subclasses if cls.__module__.startswith("cipo_jax.")]
        todo += subclasses
    return sorted(found, key=lambda cls: cls.__name__)


RESULTS = _package_results()


def _example(kind: Any, full: bool) -> Any:
    """A value of a type: with as much in it as there can be, or as little."""
    simple = {str: "\u00e9\u2028\n" if full else "", int: 3, float: 0.1 + 0.2, bool: full}
    if kind in simple:
        return simple[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return args[-1 if full else 0]
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and not full:
            return None
        return _example(next(a for a in args if a is not type(None)), full)
    if origin is tuple and args[-1] is ...:
        return (_example(args[0], True), _example(args[0], False)) if full else ()
    if origin is tuple:
        return tuple(_example(arg, full) for arg in args)
    if origin is dict:
        return {"k": _example(args[1], True), "\u00e9 k": _example(args[1], False)} if full else {}
    hints = typing.get_type_hints(kind)
    return kind(**{f.name: _example(hints[f.name], full) for f in dataclasses.fields(kind)})


def test_the_package_has_stage_results():
    names = {cls.__name__ for cls in RESULTS}
    assert names >= {
        "Counterfactuals", "Evaluation", "Exported", "FixedRows", "Fluency", "IterationRecord",
        "OwnAnswers", "Pairs", "Rollouts", "Weights",
    }  # fmt: skip


@pytest.mark.parametrize("full", [True, False], ids=["full", "empty"])
@pytest.mark.parametrize("cls", RESULTS, ids=lambda cls: cls.__name__)
def test_a_result_comes_back(tmp_path, cls, full):
    result, path = _example(cls, full), tmp_path / "deep" / "stage"
    path.parent.mkdir()
    entry = json.loads(json.dumps(result.save(path)))
    if cls not in (Exported, Rehearsal):  # What these say of files, the stage itself has written.
        assert all(file.is_file() for file in cls.files(path))
    found = cls.load(path, entry)
    assert found == result
    assert type(found) is cls
    # So that a stage made from it is found again.
    assert fingerprint(found) == fingerprint(result)


@pytest.mark.parametrize("cls", RESULTS, ids=lambda cls: cls.__name__)
def test_a_result_has_a_schema_of_its_own(cls):
    assert cls.schema
    assert [other.__name__ for other in RESULTS if other.schema == cls.schema] == [cls.__name__]


def test_small_fields_are_in_the_entry_and_rows_in_a_file(tmp_path):
    result = Texts(2, (Text(0, "a\u2028b"), Text(1, "")))
    assert result.save(tmp_path / "stage") == {"schema": "texts/1", "made": 2}
    (path,) = Texts.files(tmp_path / "stage")
    assert path == tmp_path / "stage.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines if line] == [row.to_row() for row in result.texts]
    assert Made(1).save(tmp_path / "made") == {"schema": "made/1", "made": 1}
    assert Made.files(tmp_path / "made") == ()


def test_a_name_with_a_dot_keeps_it(tmp_path):
    assert Texts.files(tmp_path / "lr-0.1") == (tmp_path / "lr-0.1.jsonl",)


def test_an_entry_or_row_of_another_kind_is_refused_with_its_place(tmp_path):
    path = tmp_path / "stage"
    entry = Texts(1, (Text(0, "a"),)).save(path)
    with pytest.raises(UserError, match=r"stages\.json: stage stage:made: should be an integer"):
        Texts.load(path, entry | {"made": "1"})
    with pytest.raises(UserError, match=r"stages\.json: stage stage:schema"):
        Texts.load(path, entry | {"schema": "texts/2"})
    (tmp_path / "stage.jsonl").write_text('{"schema": "text/1", "item": 0}\n')
    with pytest.raises(UserError, match=r"stage\.jsonl:1:text: is missing"):
        Texts.load(path, entry)


def test_the_result_of_a_stage_is_what_its_function_says():
    def weights(run, source: str) -> Weights:
        raise AssertionError

    def row(run, source: str) -> Text:
        raise AssertionError

    assert result_class(weights) is Weights
    with pytest.raises(TypeError, match="row must be annotated to return a StageResult"):
        result_class(row)


@pytest.mark.parametrize("full", [True, False], ids=["full", "empty"])
def test_a_summary_comes_back(tmp_path, full):
    summary = _example(Summary, full)
    write_record(tmp_path / "summary.json", summary)
    assert read_record(Summary, tmp_path / "summary.json") == summary
