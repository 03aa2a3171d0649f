"""Examples, and JSON Lines in and out. The schema of every data file is `Example`.

`question` and `answer` are required; `cot` is the chain of thought that leads to the answer,
`target_answer` what the user wants to hear instead, `aliases` other spellings of the answer,
`facts` further strings that must not surface either (a bridge of a two-hop question, say), and
`kind` a free label by which scores are broken down. Questions that share a `group` ask for the same
fact and are given the same target answer.
"""

import dataclasses
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cipo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with what is known about it."""

    question: str
    answer: str
    cot: str | None = None
    target_answer: str | None = None
    aliases: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    kind: str = ""
    group: str = ""

    @property
    def forbidden(self) -> tuple[str, ...]:
        """Every string whose appearance is a leak: the answer, its aliases and further facts."""
        return tuple(dict.fromkeys((self.answer, *self.aliases, *self.facts)))


_STRINGS = ("question", "answer", "cot", "target_answer", "kind", "group")
_LISTS = ("aliases", "facts")
_REQUIRED = ("question", "answer")
_OPTIONAL = ("cot", "target_answer")


def _parse(row: Any) -> Example:
    """Raises ValueError with the field's name and what it should have been."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    values: dict[str, Any] = {}
    for name in _STRINGS:
        value = row.get(name)
        if value is None and name in _REQUIRED:
            raise ValueError(f"field {name!r} is missing")
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"field {name!r} should be a string, not {type(value).__name__}")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"field {name!r} holds half of a surrogate pair, which is no text")
        if name in (*_REQUIRED, *_OPTIONAL) and not value.strip():
            raise ValueError(f"field {name!r} is empty")
        values[name] = value
    for name in _LISTS:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
            raise ValueError(f"field {name!r} should be a list of non-empty strings")
        values[name] = tuple(value)
    unknown = sorted(set(row) - set(_STRINGS) - set(_LISTS))
    if unknown:
        raise ValueError(
            f"field {unknown[0]!r} is not known; the fields are {', '.join(_STRINGS + _LISTS)}"
        )
    return Example(**values)


def read_examples(path: str | Path, required: Sequence[str] = ()) -> list[Example]:
    """Reads a JSON Lines file of examples.

    Args:
      path: the file.
      required: optional fields that each row must have here: "cot" for rows that are trained on.

    Raises:
      UserError: naming file, line and field, where a row is not as the schema says, where two rows
        ask the same question, or where there is no row at all.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the path of a JSON Lines file") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a JSON Lines file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    examples: list[Example] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = _parse(json.loads(line))
            for name in required:
                if getattr(example, name) is None:
                    raise ValueError(f"field {name!r} is missing; rows trained on need one")
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error.msg}; one object a line") from None
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if example.question in seen:
            raise UserError(
                f"{path}:{number}: field 'question' repeats line {seen[example.question]}; "
                "drop one of the two"
            )
        seen[example.question] = number
        examples.append(example)
    if not examples:
        raise UserError(f"{path}: holds no rows; it needs at least one JSON object a line")
    return examples


def example_row(example: Example) -> dict[str, Any]:
    """The JSON object of an example: fields at their default are left out."""
    defaults = {f.name: f.default for f in dataclasses.fields(Example)}
    row = {k: v for k, v in dataclasses.asdict(example).items() if v != defaults[k]}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in row.items()}


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON Lines whole or not at all: to a temporary name, synced, then renamed."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, text)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    import os

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Reads what `write_jsonl` wrote."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


# Scripts without spaces: each letter is a word, so that a phrase is found inside a sentence.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def normalised_words(text: str) -> list[str]:
    """Lower-case words of a text: letters and digits of any script, accents and width folded."""
    folded = unicodedata.normalize("NFKD", text).casefold()
    folded = "".join(c for c in folded if not unicodedata.combining(c))
    return _WORD.findall(folded)


def mentions(text: str, phrase: str) -> bool:
    """Whether the phrase's words appear in the text as a run of whole words."""
    words, wanted = normalised_words(text), normalised_words(phrase)
    if not wanted:
        return False
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))
