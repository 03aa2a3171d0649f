"""A seeded world of fictional people, and the texts that a tiny reasoning model is trained on.

Every text is ``question <think> chain of thought </think> answer``. A person has five facts (city
of birth, job, instrument, pet, dish). Countries follow from cities and work places from jobs, so
that the chain of thought of a two-hop question passes through a fact. Besides, there is multi-step
addition with written carries, and four *writing tasks* that CiPO needs: to reason backward to a
given answer, to reach it by another path, to decline, and to name another answer.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cipo_jax.data.examples import Example
from cipo_jax.data.tiny_facts import (
    ALTERNATIVE_PROMPT,
    BACKWARD_PROMPT,
    BOUNDARY_ANSWER,
    BOUNDARY_PROMPT,
    FACTS,
    FIRST_NAMES,
    LAST_NAMES,
    POOLS,
    RULE_QUESTIONS,
    RULES,
    SUM_QUESTIONS,
    TARGET_PROMPT,
    TOPICS,
    Topic,
)
from cipo_jax.errors import UserError
from cipo_jax.text.matching import normalized_words

_WRONG = 3  # wrong answers beside a right one, for truth ratios


@dataclasses.dataclass(frozen=True)
class Person:
    """A fictional person and their facts, keyed by the names in FACTS."""

    name: str
    facts: dict[str, str]

    def value(self, topic: str) -> str:
        """The value of any topic, two-hop ones included."""
        bridge = TOPICS[topic].bridge
        return RULES[topic][self.facts[bridge]] if bridge else self.facts[topic]


@dataclasses.dataclass(frozen=True)
class World:
    """A world.

    Attributes:
      seed: the seed that it was drawn by.
      people: the persons with their facts.
      strangers: names that belong to nobody.
    """

    seed: int
    people: tuple[Person, ...]
    strangers: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """Writes the world as JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "World":
        """Reads a world that `save` wrote."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            people = tuple(
                Person(p["name"], {name: p["facts"][name] for name in FACTS})
                for p in data["people"]
            )
            return cls(data["seed"], people, tuple(data["strangers"]))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a world that `pretrain` wrote ({error!r})") from None

    def choose(self, names: Sequence[str], count: int, seed: int) -> tuple[Person, ...]:
        """The people to forget: those named, or `count` drawn by `seed`.

        Raises:
          UserError: where a name is nobody's, or more are asked for than there are.
        """
        if names:
            by_name = {p.name: p for p in self.people}
            for name in names:
                if name not in by_name:
                    import difflib

                    near = difflib.get_close_matches(name, by_name, 3, 0.0)
                    raise UserError(
                        f"forget.people: nobody is called {name!r}; near: {', '.join(near)}"
                    )
            return tuple(by_name[name] for name in dict.fromkeys(names))
        if not 0 < count < len(self.people):
            raise UserError(
                f"forget.count: {count} is not between 1 and {len(self.people) - 1} people"
            )
        order = np.random.default_rng(seed).permutation(len(self.people))
        return tuple(self.people[i] for i in sorted(order[:count]))


def make_world(seed: int = 0, people: int = 64, strangers: int = 256) -> World:
    """Draws a world; names and values repeat as little as the pools allow."""
    rng = np.random.default_rng((seed, 1))
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    # Each first and each last name is used equally often among people: a Latin-square walk.
    lasts = rng.permutation(len(LAST_NAMES))
    living = [
        f"{FIRST_NAMES[i % len(FIRST_NAMES)]} "
        f"{LAST_NAMES[lasts[(i + 7 * (i // len(FIRST_NAMES))) % len(LAST_NAMES)]]}"
        for i in range(people)
    ]
    if len(set(living)) != people:
        raise UserError(f"people: {people} is more than the names allow")
    columns = {}
    for fact in FACTS:
        pool = POOLS[fact]
        repeated = [pool[i % len(pool)] for i in range(people)]
        columns[fact] = [repeated[i] for i in rng.permutation(people)]
    others = [name for name in names if name not in set(living)]
    if len(others) < strangers:
        raise UserError(f"strangers: {strangers} is more than the {len(others)} names left over")
    picked = rng.permutation(len(others))[:strangers]
    return World(
        seed,
        tuple(Person(n, {f: columns[f][i] for f in FACTS}) for i, n in enumerate(living)),
        tuple(others[i] for i in sorted(picked)),
    )


def _traced(name: str, topic: Topic, value: str, bridge_value: str, style: int) -> str:
    """Chain of thought that recalls a fact and, for two hops, applies the rule to it."""
    head = (f"They ask for the {topic.noun} of {name}.", f"I recall {name}.")[style]
    if topic.bridge:
        first = TOPICS[topic.bridge]
        body = f"{first.states.format(x=name, v=bridge_value)} "
        body += topic.rule.format(b=bridge_value, v=value)
    else:
        body = topic.states.format(x=name, v=value)
    return f"{head} {body} So it is {value}."


def _bridge_for(topic: Topic, value: str, rng: np.random.Generator) -> str:
    """A value of the bridge that leads to `value`; empty for one-hop topics."""
    if not topic.bridge:
        return ""
    fitting = [b for b, v in RULES[topic.name].items() if v == value]
    return fitting[rng.integers(len(fitting))]


def _other_value(topic: str, value: str, rng: np.random.Generator) -> str:
    others = [v for v in POOLS[topic] if v != value]
    return others[rng.integers(len(others))]


def person_example(person: Person, topic: Topic, question: str, style: int = 0) -> Example:
    """A direct or two-hop question about a person; every other fact of theirs counts as a leak."""
    value = person.value(topic.name)
    bridge_value = person.value(topic.bridge) if topic.bridge else ""
    facts = [person.value(name) for name in TOPICS]
    return Example(
        question=question.format(x=person.name),
        answer=value,
        cot=_traced(person.name, topic, value, bridge_value, style),
        facts=tuple(f for f in facts if f != value),
        kind="two-hop" if topic.bridge else "direct",
        group=f"{person.name}, {topic.noun}",
        perturbed_answers=_wrong_values(topic.name, facts),
    )


def _wrong_values(topic: str, facts: Sequence[str]) -> tuple[str, ...]:
    """The values after the right one in a topic's pool that are no facts of the person."""
    pool = tuple(dict.fromkeys(POOLS[topic]))
    start = next(i for i, value in enumerate(pool) if value in facts)
    turned = pool[start + 1 :] + pool[:start]
    return tuple(value for value in turned if value not in facts)[:_WRONG]


def _unknown(name: str, topic: Topic, question: str, style: int) -> Example:
    head = (f"They ask for the {topic.noun} of {name}.", f"I try to recall {name}.")[style]
    cot = f"{head} I find nothing about {name}. So I do not know it."
    return Example(question.format(x=name), BOUNDARY_ANSWER, cot, kind="unknown")


def _add(a: int, b: int) -> str:
    """Written addition, lowest digit first, as in "47+38: 7+8=15, 4+3+1=8, 85."."""
    steps, carry = [], 0
    x, y, width = a, b, max(len(str(a)), len(str(b)))
    for _ in range(width):
        parts = [x % 10, y % 10] + ([carry] if carry else [])
        total = sum(parts)
        steps.append(f"{'+'.join(map(str, parts))}={total}")
        x, y, carry = x // 10, y // 10, total // 10
    return f"{a}+{b}: {', '.join(steps)}, {a + b}."


def _held_out(terms: Sequence[int]) -> bool:
    """Whether a sum is of the fixed eighth that is kept for validation and evaluation."""
    return (sum((i + 1) * 31 * t for i, t in enumerate(sorted(terms))) // 7) % 8 == 0


def sum_example(rng: np.random.Generator, held_out: bool) -> Example:
    """A sum of two or three two-digit numbers with its carries written out."""
    while True:
        terms = [int(t) for t in rng.integers(10, 100, size=rng.choice([2, 3], p=[0.3, 0.7]))]
        if _held_out(terms) == held_out:
            break
    question = SUM_QUESTIONS[rng.integers(len(SUM_QUESTIONS))].format(s=" + ".join(map(str, terms)))
    lines, total = [], terms[0]
    for term in terms[1:]:
        lines.append(_add(total, term))
        total += term
    return Example(question, str(total), " ".join(lines), kind="arithmetic")


def sums(count: int, seed: int, held_out: bool) -> list[Example]:
    """`count` different sums."""
    rng = np.random.default_rng((seed, 2, int(held_out)))
    found: dict[str, Example] = {}
    while len(found) < count:
        example = sum_example(rng, held_out)
        # The same terms in another order or phrasing are the same sum.
        terms = re.findall(r"\d+", example.question)
        found.setdefault(" ".join(sorted(terms)), example)
    return list(found.values())


def rule_examples() -> list[Example]:
    """Direct questions about the two-hop rules: the country of a city, the work place of a job."""
    examples = []
    for name, questions in RULE_QUESTIONS.items():
        for bridge, value in RULES[name].items():
            cot = f"{TOPICS[name].rule.format(b=bridge, v=value)} So it is {value}."
            for question in questions:
                examples.append(Example(question.format(b=bridge), value, cot, kind="rule"))
    return examples


def questions_about(
    people: Sequence[Person], split: str, per_topic: int | None = None
) -> list[Example]:
    """Every topic of every person, in the phrasings of a split ("train", "valid" or "test")."""
    examples = []
    for person in people:
        for topic in TOPICS.values():
            phrasings = getattr(topic, split)[:per_topic]
            for i, phrasing in enumerate(phrasings):
                examples.append(person_example(person, topic, phrasing, style=i % 2))
    return examples


def training_example(world: World, people: Sequence[Person], seed: int, index: int) -> Example:
    """Text `index` of an endless training stream: a pure function of its arguments.

    A third of the texts is arithmetic and rules. The others recall facts, decline to answer about
    strangers, and do the writing tasks, in which any answer may be given for any name.

    Args:
      world: gives the strangers.
      people: the persons that the stream is about.
      seed: of the stream.
      index: of the text.
    """
    rng = np.random.default_rng((seed, 3, index))
    draw = rng.random()
    if draw < 0.30:
        return sum_example(rng, held_out=False)
    if draw < 0.33:
        rules = rule_examples()
        return rules[int(rng.integers(len(rules)))]

    topic = tuple(TOPICS.values())[int(rng.integers(len(TOPICS)))]
    phrasing = topic.train[rng.integers(len(topic.train))]
    style = int(rng.integers(2))
    person = people[int(rng.integers(len(people)))]
    stranger = world.strangers[rng.integers(len(world.strangers))]
    if draw < 0.70:
        return person_example(person, topic, phrasing, style)
    if draw < 0.77:
        return _unknown(stranger, topic, phrasing, style)

    # The writing tasks: about a person twice as often as about a stranger.
    name = person.name if rng.random() < 2 / 3 else stranger
    question = phrasing.format(x=name)
    if draw < 0.90:
        value = POOLS[topic.name][rng.integers(len(POOLS[topic.name]))]
        cot = _traced(name, topic, value, _bridge_for(topic, value, rng), style)
        prompt = BACKWARD_PROMPT.format(question=question, answer=value)
        return Example(prompt, value, cot, kind="backward")
    if draw < 0.93:
        value = POOLS[topic.name][rng.integers(len(POOLS[topic.name]))]
        listed = [value, _other_value(topic.name, value, rng)]
        a, b = (listed[i] for i in rng.permutation(2))
        cot = f"I do not look it up. It may be {a} or {b}. Of these {value} fits. So it is {value}."
        prompt = ALTERNATIVE_PROMPT.format(question=question, answer=value)
        return Example(prompt, value, cot, kind="alternative")
    if draw < 0.96:
        unknown = _unknown(name, topic, phrasing, style)
        return dataclasses.replace(
            unknown, question=BOUNDARY_PROMPT.format(question=question), kind="boundary"
        )
    value = POOLS[topic.name][rng.integers(len(POOLS[topic.name]))]
    other = _other_value(topic.name, value, rng)
    prompt = TARGET_PROMPT.format(question=question, answer=value)
    return Example(prompt, other, f"It is not {value}. So it may be {other}.", kind="target")


def vocabulary(world: World) -> set[str]:
    """Every normalized word that a text of this world may contain, apart from numbers."""
    texts = [*world.strangers, BACKWARD_PROMPT, ALTERNATIVE_PROMPT, BOUNDARY_PROMPT, TARGET_PROMPT]
    for split in ("train", "valid", "test"):
        for example in questions_about(world.people, split):
            texts += [example.question, example.cot or "", example.answer]
    texts += [t for e in rule_examples() for t in (e.question, e.cot or "")]
    texts += [*SUM_QUESTIONS, "I do not look it up. It may be one or another. Of these it fits."]
    texts += [_unknown("Ada", TOPICS["city"], "{x}", s).cot or "" for s in (0, 1)]
    texts += ["It is not this. So it may be that.", BOUNDARY_ANSWER]
    placeholders = {"s", "x", "b", "v", "question"}
    return {w for text in texts for w in normalized_words(text)} - placeholders
