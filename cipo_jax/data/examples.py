"""Examples, and JSON Lines out. The schema of our own data files is `Example`.

`question` and `answer` are required; `cot` is the chain of thought that leads to the answer,
`target_answer` what the user wants to hear instead, `aliases` other spellings of the answer,
`facts` further strings that must not surface either (a bridge of a two-hop question, say), and
`kind` a free label by which scores are broken down. Questions that share a `group` ask for the same
fact and are given the same target answer. `paraphrased_question` and `paraphrased_answer` say the
same in other words, `perturbed_answers` are wrong answers to compare with, as in TOFU.
"""

import dataclasses
import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()

    @property
    def forbidden(self) -> tuple[str, ...]:
        """Every string whose appearance is a leak: the answer, its aliases and further facts."""
        return tuple(dict.fromkeys((self.answer, *self.aliases, *self.facts)))


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
    # Of this process: another may be writing the same.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


_LONG = 8  # words; a fact of more is a sentence
_SHARE = 0.75
# They say nothing about whether a sentence's fact was given away.
_FUNCTION_WORDS = {
    "a", "an", "and", "are", "as", "at", "be", "been", "but", "by", "for", "from", "had", "has",
    "have", "he", "her", "his", "in", "into", "is", "it", "its", "not", "of", "on", "or", "s",
    "she", "that", "the", "their", "they", "this", "to", "was", "were", "which", "who", "whose",
    "will", "with", "would",
}  # fmt: skip


def states(text: str, fact: str, question: str) -> bool:
    """Whether a text gives a fact away.

    A short fact is given away where its words appear as a run (`mentions`). Of a sentence, such as
    the answers of R-TOFU, nobody repeats every word: it is given away where three quarters of the
    words that it adds to the question appear, in any order; function words do not count.
    """
    words = normalised_words(fact)
    added = set(words) - set(normalised_words(question)) - _FUNCTION_WORDS
    if len(words) <= _LONG or not added:
        return mentions(text, fact)
    return len(added & set(normalised_words(text))) >= _SHARE * len(added)
