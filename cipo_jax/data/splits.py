"""The nine splits of a run, from a tiny world or from data files, all as lists of `Example`.

train splits are learned from, valid splits choose the checkpoint, eval splits are only reported.
"""

import dataclasses
import functools
from collections.abc import Iterator

from cipo_jax.config import Config
from cipo_jax.data import tiny_world
from cipo_jax.data.examples import Example
from cipo_jax.data.readers import read_examples
from cipo_jax.errors import UserError
from cipo_jax.hub import resolve
from cipo_jax.text.matching import normalized_words

_FILES = tuple(
    role + part for role in ("forget", "retain", "reasoning") for part in ("", "_valid", "_eval")
)
_SUM_ROWS = {"train": 2000, "valid": 128, "eval": 200}


@dataclasses.dataclass(frozen=True)
class Splits:
    """What is to be forgotten, to be retained, and to be reasoned about."""

    forget: tuple[Example, ...]
    forget_valid: tuple[Example, ...]
    forget_eval: tuple[Example, ...]
    retain: tuple[Example, ...]
    retain_valid: tuple[Example, ...]
    retain_eval: tuple[Example, ...]
    reasoning: tuple[Example, ...]
    reasoning_valid: tuple[Example, ...]
    reasoning_eval: tuple[Example, ...]
    words: frozenset[str]  # every word that a fluent text about these things may use
    rehearse: tuple[Example, ...] = ()  # retained as well, and nothing is scored by it
    forgotten_people: frozenset[str] = frozenset()  # of a tiny world

    def named(self) -> Iterator[tuple[str, tuple[Example, ...]]]:
        """(name, examples) of each split."""
        for field in dataclasses.fields(self):
            if field.name not in ("words", "forgotten_people"):
                yield field.name, getattr(self, field.name)

    def for_evaluation(self) -> dict[str, tuple[Example, ...]]:
        """The splits that are only reported, by role."""
        return {
            "forget": self.forget_eval,
            "retain": self.retain_eval,
            "reasoning": self.reasoning_eval,
        }

    def for_validation(self) -> dict[str, tuple[Example, ...]]:
        """The splits that early stop and best checkpoint go by, by role."""
        return {
            "forget": self.forget_valid,
            "retain": self.retain_valid,
            "reasoning": self.reasoning_valid,
        }

    @functools.cached_property  # Asked for by every generation that is judged.
    def fact_words(self) -> frozenset[str]:
        """Words of any answer, alias, fact or target answer, in lower case."""
        phrases = {
            phrase
            for name, examples in self.named()
            if name != "rehearse"  # Their answers may be anything, "I do not know" among them.
            for example in examples
            for phrase in (*example.forbidden, example.target_answer or "")
        }
        return frozenset(word for phrase in phrases for word in normalized_words(phrase))


def spread(examples: tuple[Example, ...], count: int) -> tuple[Example, ...]:
    """`count` examples evenly spaced over the list; all of them for 0."""
    if not count or count >= len(examples):
        return examples
    return tuple(examples[i * len(examples) // count] for i in range(count))


def load_splits(config: Config) -> Splits:
    """The splits that the config asks for; a file that is off raises UserError, as does a lack."""
    given = [name for name in _FILES if getattr(config.data, name)]
    if config.data.world and given:
        raise UserError(
            f"config.data.{given[0]} and config.data.world are both given: set "
            "--config.data.world= (empty) to read the files"
        )
    splits = _from_world(config) if config.data.world else _from_files(config)
    valid, evals = config.data.valid_rows, config.data.eval_rows
    more = tuple(read_examples(config.data.rehearse, ("cot",))) if config.data.rehearse else ()
    said = {w for e in more for text in (e.cot or "", e.answer) for w in normalized_words(text)}
    return dataclasses.replace(
        splits,
        rehearse=more,
        words=splits.words | said,
        retain_valid=spread(splits.retain_valid, valid),
        reasoning_valid=spread(splits.reasoning_valid, valid),
        forget_eval=spread(splits.forget_eval, evals),
        retain_eval=spread(splits.retain_eval, evals),
        reasoning_eval=spread(splits.reasoning_eval, evals),
    )


def _from_world(config: Config) -> Splits:
    world = tiny_world.World.load(resolve(config.data.world))
    names, earlier = (
        tuple(name.strip() for name in text.split(",") if name.strip())
        for text in (config.forget.people, config.forget.earlier)
    )
    forget = world.choose(names, config.forget.count, config.forget.seed)
    gone = world.choose(earlier, 0, 0) if earlier else ()
    if both := [p.name for p in forget if p in gone]:
        raise UserError(f"config.forget.earlier: {both[0]!r} is also to be forgotten now")
    retain = tuple(p for p in world.people if p not in forget + gone)
    if not retain:
        raise UserError("config.forget.earlier: nobody is left to be retained")
    about = tiny_world.questions_about
    return Splits(
        forget=tuple(about(forget, "train")),
        forget_valid=tuple(about(forget, "valid")),
        forget_eval=tuple(about(forget, "test")),
        retain=(*about(retain, "train"), *tiny_world.rule_examples()),
        retain_valid=tuple(about(retain, "valid")),
        retain_eval=tuple(about(retain, "test", per_topic=1)),
        reasoning=tuple(tiny_world.sums(_SUM_ROWS["train"], 1, held_out=False)),
        # One draw of held-out sums, so that no sum is in both splits.
        reasoning_valid=tuple(_held_out_sums()[: _SUM_ROWS["valid"]]),
        reasoning_eval=tuple(_held_out_sums()[_SUM_ROWS["valid"] :]),
        words=frozenset(tiny_world.vocabulary(world)),
        forgotten_people=frozenset(p.name for p in forget),
    )


def _held_out_sums() -> list[Example]:
    return tiny_world.sums(_SUM_ROWS["valid"] + _SUM_ROWS["eval"], 1, held_out=True)


def _from_files(config: Config) -> Splits:
    data = config.data
    read: dict[str, tuple[Example, ...]] = {}
    for role in ("forget", "retain", "reasoning"):
        source = getattr(data, role)
        if not source and role == "forget":
            raise UserError(
                "config.data.forget is empty: give a JSON Lines file of what to forget, "
                "FOLDER:NAME or hub:OWNER/NAME:PART, or set config.data.world"
            )
        required = () if role == "forget" else ("cot",)
        read[role] = tuple(read_examples(source, required)) if source else ()
        for part in ("valid", "eval"):
            other = getattr(data, f"{role}_{part}")
            read[f"{role}_{part}"] = tuple(read_examples(other)) if other else read[role]
    texts = [t for rows in read.values() for e in rows for t in (e.question, e.cot or "", e.answer)]
    words = frozenset(w for text in texts for w in normalized_words(text))
    return Splits(words=words, forgotten_people=frozenset(), **read)
