"""Rows of the sources that a config can name: files, folders and data sets.

A source is one of

* a path to JSON Lines, or to one JSON array of objects (.jsonl or .json),
* FOLDER:NAME or FOLDER/NAME, for NAME.json or NAME.jsonl in a folder such as R-TOFU's,
* hub:OWNER/NAME:PART, for a data set that `datasets` loads from the Hugging Face hub, or from a
  local folder in place of OWNER/NAME; PART is a configuration, CONFIGURATION/SPLIT, a split or the
  name of a file.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cipo_jax.errors import UserError

_WAYS = "give a JSON Lines file, FOLDER:NAME or hub:OWNER/NAME:PART"


class Table(NamedTuple):
    """Parsed but uninterpreted rows.

    Attributes:
      name: the name in messages, before the row's number.
      rows: (number, row) in order.
      foreign: whether it is a published data set, whose repeated questions the user cannot fix.
      loose: whether unknown columns are ignored.
    """

    name: str
    rows: Iterable[tuple[int, object]]
    foreign: bool = False
    loose: bool = False


def open_source(source: str) -> Table:
    """The rows of a source; see the top of this file.

    Raises:
      UserError: where it cannot be found or read; while `rows` is iterated, where a file is not
        JSON.
    """
    if source.startswith("hub:"):
        return _load(source)
    path, foreign = _find(source)
    return Table(str(path), json_rows(path), foreign)


def _find(source: str) -> tuple[Path, bool]:
    """The file that a source names, and whether the source is a name in a folder."""
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
    """The one file of a folder with a name, suffix given or not."""
    files = [folder / f"{name}{suffix}" for suffix in ("", ".json", ".jsonl")]
    found = [file for file in files if file.is_file()]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name} both go by {name!r}; write the suffix too")
    return found[0] if found else None


def _listed(folder: Path) -> str:
    names = sorted({f.stem for f in folder.iterdir() if f.suffix in (".json", ".jsonl")})
    return f"there are {', '.join(names)}" if names else "there is no .json or .jsonl file"


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, without blank ones."""
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


def json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """The rows of a file: of JSON Lines by line number, of a JSON array by position."""
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


# ---- data sets


def _load(source: str) -> Table:
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
        except Exception as error:  # Network, hub and parsers raise many types.
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
    return Table(source, enumerate(table, 1), foreign=True, loose=True)


def _parts(path: str) -> str:
    """The parts of a data set, for messages."""
    import datasets

    try:
        configs = datasets.get_dataset_config_names(path)
        splits = datasets.get_dataset_split_names(path, configs[0])
    except Exception as error:  # It is only part of a message.
        return _one_line(error)
    return f"configurations: {', '.join(configs)}; splits of the first: {', '.join(splits)}"


def _one_line(error: BaseException) -> str:
    """An error and its cause, without newlines."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    cause = f": {_one_line(error.__cause__)}" if error.__cause__ else ""
    return f"{text[:300]}{cause}"
