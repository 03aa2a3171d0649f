"""Examples from files and data sets.

A source is one of

* a path to JSON Lines, or to one JSON array of objects (.jsonl or .json),
* FOLDER:NAME or FOLDER/NAME, for NAME.json or NAME.jsonl in a folder such as R-TOFU's,
* hub:OWNER/NAME:PART, for what `datasets` loads from the Hugging Face hub, or from a local folder
  in place of OWNER/NAME; PART is a configuration, CONFIGURATION/SPLIT, a split or a file's name.

Rows are known by their fields, never by a file's name: those of `Example`; those of R-TOFU and
TOFU, which write perturbed_answer, and whose task_id and original_answer mean nothing here; and
those of RETURN, where a row is a person with many questions.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cipo_jax.data.examples import Example
from cipo_jax.errors import UserError

_LISTS = ("aliases", "facts", "perturbed_answers")
_TEXTS = tuple(f.name for f in dataclasses.fields(Example) if f.name not in _LISTS)
_OURS = frozenset((*_TEXTS, *_LISTS))
_REQUIRED = ("question", "answer")
# "" stands for "none" in published files; of our own fields the labels alone may be empty.
_MAY_BE_EMPTY = ("cot", "paraphrased_question", "paraphrased_answer")
_LABELS = ("kind", "group")
_OTHER_NAMES = {"perturbed_answer": "perturbed_answers"}
_WITHOUT_MEANING = frozenset(("task_id", "original_answer"))
_PEOPLE = ("qa_list", "data")  # where RETURN, and RETURN as judged by its authors' code, have it
_SURROGATE = re.compile("[\ud800-\udfff]")
_WAYS = "give a JSON Lines file, FOLDER:NAME or hub:OWNER/NAME:PART"


class _Table(NamedTuple):
    """Rows before they are understood.

    Attributes:
      name: stands before the row's number in messages.
      rows: (number, row) in order.
      foreign: whether it is a data set of others, whose repetitions are not the reader's to mend.
      loose: whether it may have columns that mean nothing here.
    """

    name: str
    rows: Iterable[tuple[int, Any]]
    foreign: bool = False
    loose: bool = False


def read_examples(source: str | Path, required: Sequence[str] = ()) -> list[Example]:
    """Reads the examples of a source; see the top of this file.

    Of questions that come twice in the files of others the first is kept, and a warning tells how
    many were left out.

    Args:
      source: a path, FOLDER:NAME or hub:OWNER/NAME:PART.
      required: optional fields that each row must have here: "cot" for rows that are trained on.

    Raises:
      UserError: naming file, row and field, where a row is not as it should be, where two rows of
        ours ask the same question, or where there is no row at all.
    """
    table = _open(str(source))
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
                elif table.foreign or not set(row) <= _OURS:
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
      UserError: naming the file and the line, where there is none.
    """
    questions = []
    for number, row in _rows(Path(path)):
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
    """Reads a file with a text in each line: plain, or as JSON strings.

    Raises:
      UserError: naming file and line, where the two kinds mix, or a line is JSON but no text.
    """
    texts: list[str] = []
    kinds: list[bool] = []
    for number, line in _lines(Path(path).expanduser()):
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


def _examples(row: Any, unread: set[str] | None) -> Iterator[Example]:
    """The examples of a row; raises ValueError with the field's name and what it should have been.

    Args:
      row: as it was read.
      unread: takes the names of fields that are not known; None to raise instead.
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


def _example(row: dict[str, Any], unread: set[str] | None) -> Example:
    values: dict[str, Any] = {}
    given = [name for name, value in row.items() if value is not None]
    for name in _REQUIRED:
        if name not in given:
            raise ValueError(f"field {name!r} is missing; the row has {', '.join(given) or 'none'}")
    for name, value in row.items():
        field = _OTHER_NAMES.get(name, name)
        if value is None or name in _WITHOUT_MEANING or (name in _MAY_BE_EMPTY and value == ""):
            continue
        if field in values:
            raise ValueError(f"field {name!r} is there under two names; keep one")
        if field in _TEXTS:
            if not isinstance(value, str):
                raise ValueError(f"field {name!r} should be a string, not {type(value).__name__}")
            _check_text(f"field {name!r}", value, may_be_empty=name in _LABELS)
            values[field] = value
        elif field in _LISTS:
            strings = isinstance(value, list) and all(isinstance(v, str) for v in value)
            if not strings or not all(map(str.strip, value)):
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


# ---- files and folders


def _open(source: str) -> _Table:
    if source.startswith("hub:"):
        return _load(source)
    path, foreign = _find(source)
    return _Table(str(path), _rows(path), foreign)


def _find(source: str) -> tuple[Path, bool]:
    """The file that a source names, and whether it is named within a folder."""
    path = Path(source).expanduser()
    if path.is_file():
        return path, False
    folder, _, name = source.rpartition(":")
    named = Path(folder).expanduser()
    if folder and named.is_dir() and name:
        found = _within(named, name)
        if found is None:
            raise UserError(f"{source}: no {name}.json or {name}.jsonl there; {_listed(named)}")
        return found, True
    if path.is_dir() or (folder and named.is_dir()):
        path = path if path.is_dir() else named
        raise UserError(f"{path}: is a folder; name a file of it as {path}:NAME; {_listed(path)}")
    found = _within(path.parent, path.name)
    if found is None:
        raise UserError(f"{path}: no such file; {_WAYS}")
    return found, True


def _within(folder: Path, name: str) -> Path | None:
    """The one file of a folder that goes by a name, with or without its suffix."""
    files = [folder / f"{name}{suffix}" for suffix in ("", ".json", ".jsonl")]
    found = [file for file in files if file.is_file()]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name} both go by {name!r}; write the suffix too")
    return found[0] if found else None


def _listed(folder: Path) -> str:
    names = sorted({f.stem for f in folder.iterdir() if f.suffix in (".json", ".jsonl")})
    return f"there are {', '.join(names)}" if names else "there is no .json or .jsonl file"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file that are not blank."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield number, line


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {_WAYS}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of JSON Lines by their lines, or of a JSON array by their numbers."""
    text = _text(path)
    line = 0
    try:
        if text.lstrip()[:1] == "[":
            yield from enumerate(json.loads(text), 1)
            return
        for line, row in enumerate(text.split("\n")):
            if row.strip():
                yield line + 1, json.loads(row)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{line + error.lineno}: not JSON: {error.msg}; one object a line, or one array "
            "of objects"
        ) from None


# ---- what `datasets` loads


def _load(source: str) -> _Table:
    import datasets

    name, _, part = source.removeprefix("hub:").rpartition(":")
    if not name or not part:
        raise UserError(
            f"{source}: write hub:OWNER/NAME:PART, where PART is a configuration or a split"
        )
    folder = Path(name).expanduser()
    path = str(folder) if folder.is_dir() else name
    config, _, split = part.rpartition("/")
    if config:
        ways: list[dict[str, Any]] = [{"name": config, "split": split}]
    else:
        ways = [{"name": part}, {"split": part}, {"data_files": f"{part}.json*", "split": "train"}]
    table = None
    for way in ways:
        try:
            table = datasets.load_dataset(path, **way)
            break
        except ValueError:  # No such configuration or split.
            continue
        except Exception as error:  # Whatever the network, the hub and the parsers raise.
            if "data_files" in way and isinstance(error, FileNotFoundError):
                continue
            raise UserError(f"{source}: datasets cannot load it: {_one_line(error)}") from None
    if table is None:
        raise UserError(f"{source}: there is no {part!r}; {_parts(path)}")
    if isinstance(table, dict):
        if len(table) > 1:
            raise UserError(
                f"{source}: has the splits {', '.join(table)}; write one, as in "
                f"{source}/{next(iter(table))}"
            )
        table = next(iter(table.values()))
    return _Table(source, enumerate(table, 1), foreign=True, loose=True)


def _parts(path: str) -> str:
    """What a data set is made of, for messages."""
    import datasets

    try:
        configs = datasets.get_dataset_config_names(path)
        splits = datasets.get_dataset_split_names(path, configs[0])
    except Exception as error:  # It only serves to help with a message.
        return _one_line(error)
    return f"configurations: {', '.join(configs)}; splits of the first: {', '.join(splits)}"


def _one_line(error: BaseException) -> str:
    """An error and what it came from, without newlines."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    cause = f": {_one_line(error.__cause__)}" if error.__cause__ else ""
    return f"{text[:300]}{cause}"
