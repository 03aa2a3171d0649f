"""The splits of a run, from a tiny world or from data files, as tuples of `Example`.

The roles forget, retain and reasoning have three splits each: one to train on, one for validation
(it chooses the checkpoint) and one for evaluation (it is only reported).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

from cipo_jax.data import tiny_world
from cipo_jax.data.examples import Example
from cipo_jax.data.readers import read_examples
from cipo_jax.errors import UserError
from cipo_jax.hub import resolve
from cipo_jax.shared_config import DataConfig, ForgetConfig
from cipo_jax.text.matching import normalized_words

Role = Literal["forget", "retain", "reasoning"]

_ROLES: tuple[Role, ...] = ("forget", "retain", "reasoning")
_FILES = tuple(role + part for role in _ROLES for part in ("", "_valid", "_eval"))
_SUM_ROWS = {"train": 2000, "valid": 128, "eval": 200}


@dataclasses.dataclass(frozen=True)
class Splits:
    """The data of a run.

    Attributes:
      forget: questions to forget the answers of.
      retain: questions to keep the answers of.
      reasoning: questions that need reasoning and no facts.
      words: every normalized word that a fluent text about the data may use.
      rehearse: further examples to retain, which no score uses.
      forgotten_people: names, of a tiny world.
    """

    forget: tuple[Example, ...]
    forget_valid: tuple[Example, ...]
    forget_eval: tuple[Example, ...]
    retain: tuple[Example, ...]
    retain_valid: tuple[Example, ...]
    retain_eval: tuple[Example, ...]
    reasoning: tuple[Example, ...]
    reasoning_valid: tuple[Example, ...]
    reasoning_eval: tuple[Example, ...]
    words: frozenset[str]
    rehearse: tuple[Example, ...] = ()
    forgotten_people: frozenset[str] = frozenset()

    def named(self) -> Iterator[tuple[str, tuple[Example, ...]]]:
        """(name, examples) of each split."""
        for field in dataclasses.fields(self):
            if field.name not in ("words", "forgotten_people"):
                yield field.name, getattr(self, field.name)

    def for_evaluation(self) -> dict[Role, tuple[Example, ...]]:
        """The evaluation splits by role; they are only reported."""
        return {
            "forget": self.forget_eval,
            "retain": self.retain_eval,
            "reasoning": self.reasoning_eval,
        }

    def for_validation(self) -> dict[Role, tuple[Example, ...]]:
        """The validation splits by role; early stop and the best checkpoint depend on them."""
        return {
            "forget": self.forget_valid,
            "retain": self.retain_valid,
            "reasoning": self.reasoning_valid,
        }

    @functools.cached_property
    def fact_words(self) -> frozenset[str]:
        """The normalized words of all answers, aliases, facts and target answers."""
        phrases = {
            phrase
            for name, examples in self.named()
            if name != "rehearse"  # Their answers need not be facts: "I do not know".
            for example in examples
            for phrase in (*example.forbidden, example.target_answer or "")
        }
        return frozenset(word for phrase in phrases for word in normalized_words(phrase))


def spread(examples: tuple[Example, ...], count: int) -> tuple[Example, ...]:
    """`count` examples evenly spaced over the list; all of them for 0."""
    if not count or count >= len(examples):
        return examples
    return tuple(examples[i * len(examples) // count] for i in range(count))


def load_splits(data: DataConfig, forget: ForgetConfig) -> Splits:
    """The splits that the config selects.

    Args:
      data: the sources, and the sizes of the validation and evaluation splits.
      forget: whom to forget in a tiny world; files are not affected.

    Raises:
      UserError: where a file is invalid or missing, or a name belongs to nobody.
    """
    given = [name for name in _FILES if getattr(data, name)]
    if data.world and given:
        raise UserError(
            f"config.data.{given[0]} and config.data.world are both given: set "
            "--config.data.world= (empty) to read the files"
        )
    splits = _from_world(data, forget) if data.world else _from_files(data)
    rehearse = tuple(read_examples(data.rehearse, ("cot",))) if data.rehearse else ()
    texts = (text for e in rehearse for text in (e.cot or "", e.answer))
    return dataclasses.replace(
        splits,
        rehearse=rehearse,
        words=splits.words | {word for text in texts for word in normalized_words(text)},
        retain_valid=spread(splits.retain_valid, data.valid_rows),
        reasoning_valid=spread(splits.reasoning_valid, data.valid_rows),
        forget_eval=spread(splits.forget_eval, data.eval_rows),
        retain_eval=spread(splits.retain_eval, data.eval_rows),
        reasoning_eval=spread(splits.reasoning_eval, data.eval_rows),
    )


def _from_world(data: DataConfig, forget: ForgetConfig) -> Splits:
    world = tiny_world.World.load(resolve(data.world))
    now = world.choose(tuple(forget.people), forget.count, forget.seed)
    earlier = world.choose(tuple(forget.earlier), 0, 0) if forget.earlier else ()
    if both := [p.name for p in now if p in earlier]:
        raise UserError(f"config.forget.earlier: {both[0]!r} is also to be forgotten now")
    retain = tuple(p for p in world.people if p not in now + earlier)
    if not retain:
        raise UserError("config.forget.earlier: nobody is left to be retained")
    about = tiny_world.questions_about
    # One draw of held-out sums, so that no sum is in both splits.
    held_out = tiny_world.sums(_SUM_ROWS["valid"] + _SUM_ROWS["eval"], 1, held_out=True)
    return Splits(
        forget=tuple(about(now, "train")),
        forget_valid=tuple(about(now, "valid")),
        forget_eval=tuple(about(now, "test")),
        retain=(*about(retain, "train"), *tiny_world.rule_examples()),
        retain_valid=tuple(about(retain, "valid")),
        retain_eval=tuple(about(retain, "test", per_topic=1)),
        reasoning=tuple(tiny_world.sums(_SUM_ROWS["train"], 1, held_out=False)),
        reasoning_valid=tuple(held_out[: _SUM_ROWS["valid"]]),
        reasoning_eval=tuple(held_out[_SUM_ROWS["valid"] :]),
        words=frozenset(tiny_world.vocabulary(world)),
        forgotten_people=frozenset(p.name for p in now),
    )


def _from_files(data: DataConfig) -> Splits:
    read: dict[str, tuple[Example, ...]] = {}
    for role in _ROLES:
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
