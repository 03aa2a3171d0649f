"""Examples, questions and lines of text from data files.

Rows are identified by their fields, never by the name of a file: those of `Example`; those of
R-TOFU and TOFU, which name a field perturbed_answer and whose task_id and original_answer are
ignored; and those of RETURN, where a row is a person with many questions. `data.sources` lists the
sources.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cipo_jax.data.examples import Example
from cipo_jax.data.sources import json_rows, open_source, text_lines
from cipo_jax.errors import UserError

_LISTS = ("aliases", "facts", "perturbed_answers")
_TEXTS = tuple(f.name for f in dataclasses.fields(Example) if f.name not in _LISTS)
_OURS = frozenset((*_TEXTS, *_LISTS))
_REQUIRED = ("question", "answer")
# Published files write "" for a missing value; of our own fields only the labels may be empty.
_MAY_BE_EMPTY = ("cot", "paraphrased_question", "paraphrased_answer")
_LABELS = ("kind", "group")
_OTHER_NAMES = {"perturbed_answer": "perturbed_answers"}
_IGNORED = frozenset(("task_id", "original_answer"))
_PEOPLE = ("qa_list", "data")  # fields of RETURN, and of the output of its authors' evaluation
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_examples(source: str | Path, required: Sequence[str] = ()) -> list[Example]:
    """Reads the examples of a source.

    Of a question that a published data set repeats, the first row is kept; a warning gives the
    number of the others.

    Args:
      source: a path, FOLDER:NAME or hub:OWNER/NAME:PART.
      required: optional fields that each row must have: "cot" for rows that are trained on.

    Raises:
      UserError: naming file, row and field, where a row is invalid, where two rows in the format of
        `Example` ask the same question, or where there is no row.
    """
    table = open_source(str(source))
    examples: list[Example] = []
    seen: dict[str, int] = {}
    unread: set[str] = set()
    repeats = 0
    for number, row in table.rows:
        try:
            for example in _examples(row, unread if table.loose else None):
                for name in required:
                    if getattr(example, name) is None:
                        raise ValueError(
                            f"field {name!r} is missing; rows that are trained on need one, rows "
                            "of a _valid or _eval split do not"
                        )
                if example.question not in seen:
                    seen[example.question] = number
                    examples.append(example)
                elif table.foreign or not (isinstance(row, dict) and set(row) <= _OURS):
                    repeats += 1
                else:
                    first = seen[example.question]
                    raise ValueError(f"field 'question' repeats line {first}; drop one of the two")
        except ValueError as error:
            raise UserError(f"{table.name}:{number}: {error}") from None
    if not examples:
        raise UserError(f"{table.name}: holds no rows; it needs at least one JSON object")
    if repeats:
        rows = "1 row repeats" if repeats == 1 else f"{repeats} rows repeat"
        warnings.warn(
            f"{table.name}: {rows} the question of an earlier one and was left out", stacklevel=2
        )
    if unread:
        names = ", ".join(sorted(unread))
        warnings.warn(f"{table.name}: fields that are not read: {names}", stacklevel=2)
    return examples


def read_questions(path: str | Path) -> list[str]:
    """Reads the field "question" of each line of a JSON Lines file; other fields are not read.

    Raises:
      UserError: naming the file and the line, where it is missing.
    """
    questions = []
    for number, row in json_rows(Path(path)):
        question = row.get("question") if isinstance(row, dict) else None
        if not isinstance(question, str) or not question.strip():
            raise UserError(
                f'{path}:{number}: field \'question\' is missing; a line is {{"question": "..."}}'
            )
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def read_lines(path: str | Path) -> list[str]:
    """Reads a file with one text a line, all plain or all JSON strings.

    Raises:
      UserError: naming file and line, where the two kinds mix or a line is another JSON value.
    """
    texts: list[str] = []
    kinds: list[bool] = []
    for number, line in text_lines(Path(path).expanduser()):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        texts.append(value if isinstance(value, str) else line.strip())
        kinds.append(isinstance(value, str))
        if isinstance(value, (dict, list)):
            raise UserError(f"{path}:{number}: not text but a JSON object or array")
        if kinds[-1] != kinds[0]:
            kind = "a JSON string, other lines are not" if kinds[-1] else "not a JSON string"
            raise UserError(f"{path}:{number}: {kind}; write all lines as JSON strings or none")
        try:
            _check_text("the line", texts[-1])
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not texts:
        raise UserError(f"{path}: holds no lines; it needs at least one text")
    return texts


# ---- rows


def _examples(row: object, unread: set[str] | None) -> Iterator[Example]:
    """The examples of a row; raises ValueError naming the field and its valid values.

    Args:
      row: the parsed JSON value.
      unread: collects the names of unknown fields; None to raise instead.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    people = next((name for name in _PEOPLE if isinstance(row.get(name), list)), None)
    if people is None or row.get("question") is not None:
        yield _example(row, unread)
        return
    for index, one in enumerate(row[people]):
        try:
            if not isinstance(one, dict):
                raise ValueError("not a JSON object")
            answer = one.get("answer") if one.get("gold_answer") is None else one["gold_answer"]
            yield _example({"question": one.get("question"), "answer": answer}, unread)
        except ValueError as error:
            raise ValueError(f"{people}[{index}]: {error}") from None


def _example(row: dict[str, object], unread: set[str] | None) -> Example:
    values: dict[str, Any] = {}
    given = [name for name, value in row.items() if value is not None]
    for name in _REQUIRED:
        if name not in given:
            raise ValueError(f"field {name!r} is missing; the row has {', '.join(given) or 'none'}")
    for name, value in row.items():
        field = _OTHER_NAMES.get(name, name)
        if value is None or name in _IGNORED or (name in _MAY_BE_EMPTY and value == ""):
            continue
        if field in values:
            raise ValueError(f"field {name!r} is there under two names; keep one")
        if field in _TEXTS:
            if not isinstance(value, str):
                raise ValueError(f"field {name!r} should be a string, not {type(value).__name__}")
            _check_text(f"field {name!r}", value, may_be_empty=name in _LABELS)
            values[field] = value
        elif field in _LISTS:
            if not isinstance(value, list) or not all(
                isinstance(item, str) and item.strip() for item in value
            ):
                raise ValueError(f"field {name!r} should be a list of non-empty strings")
            for item in value:
                _check_text(f"field {name!r}", item)
            values[field] = tuple(value)
        elif unread is None:
            known = ", ".join((*_TEXTS, *_LISTS))
            raise ValueError(f"field {name!r} is not known; the fields are {known}")
        else:
            unread.add(name)
    return Example(**values)


def _check_text(what: str, text: str, may_be_empty: bool = False) -> None:
    if _SURROGATE.search(text):
        raise ValueError(f"{what} holds half of a surrogate pair, which is no text")
    if not may_be_empty and not text.strip():
        raise ValueError(f"{what} is empty")
