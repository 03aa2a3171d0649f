import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import cipo_jax
from cipo_jax.data import tiny_facts, tiny_world
from cipo_jax.data.tiny_facts import FACTS, FIRST_NAMES, LAST_NAMES, TOPICS
from cipo_jax.data.tiny_world import (
    World,
    make_world,
    person_example,
    questions_about,
    rule_examples,
    sums,
    training_example,
    vocabulary,
)
from cipo_jax.errors import UserError
from cipo_jax.text.matching import mentions, normalized_words

STREAM = 4000
_DIGEST = """
import hashlib
from cipo_jax.data import tiny_world as t
world = t.make_world(3, 61, 20)
parts = [world, t.sums(20, 5, True), t.rule_examples(), t.questions_about(world.people, "test")]
parts += [t.training_example(world, world.people, 9, i) for i in range(100)]
parts += [world.choose((), 10, 7), sorted(t.vocabulary(world))]
digest = hashlib.sha256(repr(parts).encode()).hexdigest()
"""


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.fixture(scope="module")
def stream(world):
    return [training_example(world, world.people, 0, i) for i in range(STREAM)]


def _text(example):
    return f"{example.question} {example.cot} {example.answer}"


def _terms(example):
    return tuple(sorted(int(n) for n in re.findall(r"\d+", example.question)))


def _values(world):
    return {person.value(topic) for person in world.people for topic in TOPICS}


def test_everything_is_a_function_of_its_seed_in_any_process():
    here = {}
    exec(_DIGEST, here)
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", f"{_DIGEST}\nprint(digest)"],
            env=os.environ
            | {
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": str(Path(cipo_jax.__file__).parent.parent),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.strip() == here["digest"]


def test_another_seed_gives_another_world():
    assert make_world(0) == make_world(0)
    assert make_world(0).people != make_world(1).people


def test_a_text_of_the_stream_is_a_function_of_its_index_alone(world, stream):
    for i in (3999, 0, 1234):
        assert training_example(world, world.people, 0, i) == stream[i]
    assert len(set(map(_text, stream))) > STREAM // 2


def test_there_are_enough_people_with_enough_facts(world):
    assert len(world.people) >= 60
    for person in world.people:
        assert len(person.facts) >= 5
        assert tuple(person.facts) == FACTS
        assert all(person.facts.values())


def test_names_are_unique_and_strangers_are_nobody(world):
    living = [p.name for p in world.people]
    assert len(set(living)) == len(living)
    assert len(set(world.strangers)) == len(world.strangers) == 256
    assert not set(world.strangers) & set(living)


@pytest.mark.parametrize("people", [60, 200, 700])
def test_larger_worlds_keep_their_names_unique(people):
    world = make_world(0, people, 32)
    assert len({p.name for p in world.people} | set(world.strangers)) == people + 32


def test_a_world_with_too_few_names_for_its_strangers_is_an_error():
    with pytest.raises(UserError, match=r"strangers|people"):
        make_world(0, 1024, 256)


def test_values_repeat_as_little_as_the_pools_allow(world):
    for fact in FACTS:
        counts = Counter(person.facts[fact] for person in world.people)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_two_hop_values_follow_from_their_bridge(world):
    for person in world.people:
        assert person.value("country") == tiny_facts.CITIES[person.facts["city"]]
        assert person.value("workplace") == tiny_facts.JOBS[person.facts["job"]]


def test_a_world_is_saved_and_loaded(world, tmp_path):
    world.save(tmp_path / "world.json")
    assert World.load(tmp_path / "world.json") == world


def test_no_phrasing_belongs_to_two_splits():
    for topic in TOPICS.values():
        phrasings = [*topic.train, *topic.valid, *topic.test]
        assert len(set(phrasings)) == len(phrasings)
        assert all("{x}" in phrasing for phrasing in phrasings)
        assert topic.valid
        assert topic.test


def test_held_out_phrasings_never_occur_in_the_training_stream(world, stream):
    held_out = {
        " ".join(normalized_words(phrasing.format(x=name)))
        for topic in TOPICS.values()
        for phrasing in (*topic.valid, *topic.test)
        for name in (*(p.name for p in world.people), *world.strangers)
    }
    heads = {phrasing.split()[0] for phrasing in held_out}
    for example in stream:
        words = normalized_words(_text(example))
        for i, word in enumerate(words):
            if word in heads:
                for length in range(5, 13):
                    assert " ".join(words[i : i + length]) not in held_out


def test_held_out_sums_never_occur_in_the_training_stream(stream):
    held_out = {_terms(e) for e in sums(400, 1, held_out=True)}
    trained = {_terms(e) for e in stream if e.kind == "arithmetic"}
    assert len(trained) > 500
    assert not held_out & trained
    assert not held_out & {_terms(e) for e in sums(400, 1, held_out=False)}


def test_sums_are_different_questions():
    questions = [e.question for e in sums(500, 4, held_out=False)]
    assert len(set(questions)) == 500


def test_every_line_of_a_worked_sum_is_right():
    for held_out in (True, False):
        for example in sums(300, 2, held_out):
            terms = [int(n) for n in re.findall(r"\d+", example.question)]
            assert len(terms) in (2, 3)
            assert example.answer == str(sum(terms))
            lines = re.findall(r"(\d+)\+(\d+): (.*?), (\d+)\.", example.cot)
            assert len(lines) == len(terms) - 1
            total = terms[0]
            for (a, b, steps, result), term in zip(lines, terms[1:], strict=True):
                assert (int(a), int(b)) == (total, term)
                total += term
                assert int(result) == total
                carry, digits = 0, ""
                for place, step in enumerate(steps.split(", ")):
                    parts, found = step.split("=")
                    expected = [int(a) // 10**place % 10, int(b) // 10**place % 10]
                    expected += [carry] if carry else []
                    assert list(map(int, parts.split("+"))) == expected
                    assert int(found) == sum(expected)
                    carry, digits = int(found) // 10, str(int(found) % 10) + digits
                assert int(f"{carry}{digits}") == total


def test_a_trace_states_the_fact_and_a_two_hop_trace_passes_through_the_bridge(world):
    for person in world.people[:8]:
        for topic in TOPICS.values():
            for style in (0, 1):
                example = person_example(person, topic, topic.train[0], style)
                value = person.value(topic.name)
                assert example.answer == value
                assert example.cot.endswith(f"So it is {value}.")
                assert mentions(example.cot, person.name)
                if topic.bridge:
                    bridge = person.value(topic.bridge)
                    assert example.kind == "two-hop"
                    words = example.cot.replace(".", "").split()
                    assert words.index(bridge) < words.index(value)
                    assert topic.rule.format(b=bridge, v=value) in example.cot
                else:
                    assert example.kind == "direct"


def test_every_fact_of_a_person_counts_as_a_leak(world):
    for person in world.people:
        for topic in TOPICS.values():
            example = person_example(person, topic, topic.train[0])
            assert set(example.forbidden) == {person.value(name) for name in TOPICS}
            assert not any(mentions(example.question, fact) for fact in example.forbidden)


def test_questions_of_one_fact_share_a_group(world):
    examples = questions_about(world.people, "train")
    answers = {}
    for example in examples:
        answers.setdefault(example.group, set()).add(example.answer)
    assert len(answers) == len(world.people) * len(TOPICS)
    assert all(len(values) == 1 for values in answers.values())


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_no_question_is_asked_twice(world, split):
    questions = [e.question for e in questions_about(world.people, split)]
    assert len(set(questions)) == len(questions)
    assert len(questions) == len(world.people) * sum(
        len(getattr(t, split)) for t in TOPICS.values()
    )


def test_a_value_is_one_word_of_its_own(world):
    values = _values(world)
    words = [normalized_words(value) for value in values]
    assert all(len(w) == 1 for w in words)
    assert len({w[0] for w in words}) == len(values)


def test_no_value_is_a_word_of_a_name_or_a_template(world, stream):
    values = {normalized_words(value)[0] for value in _values(world)}
    names = {word for name in (*FIRST_NAMES, *LAST_NAMES) for word in normalized_words(name)}
    assert not values & names
    fields = [
        text
        for topic in TOPICS.values()
        for text in (topic.noun, topic.states, *topic.train, *topic.valid, *topic.test, topic.rule)
    ]
    prompts = [
        tiny_world.BACKWARD_PROMPT,
        tiny_world.ALTERNATIVE_PROMPT,
        tiny_world.BOUNDARY_PROMPT,
        tiny_world.TARGET_PROMPT,
        tiny_world.BOUNDARY_ANSWER,
    ]
    assert not values & {word for text in (*fields, *prompts) for word in normalized_words(text)}
    # What is said without a fact in mind names no value at all.
    silent = [e for e in stream if e.kind in ("unknown", "boundary", "arithmetic")]
    assert {e.kind for e in silent} == {"unknown", "boundary", "arithmetic"}
    assert not values & {word for e in silent for word in normalized_words(_text(e))}


def test_a_text_names_no_values_but_those_it_is_about(world, stream):
    values = {normalized_words(value)[0]: value for value in _values(world)}
    for example in stream:
        named = {word for word in normalized_words(_text(example)) if word in values}
        if example.kind in ("direct", "two-hop"):
            about = {normalized_words(fact)[0] for fact in example.forbidden}
            assert named <= about
        elif example.kind in ("backward", "alternative", "target", "rule"):
            assert 1 <= len(named) <= 2


def test_the_stream_holds_every_kind_of_text(stream):
    counts = Counter(e.kind for e in stream)
    assert set(counts) == {
        "direct", "two-hop", "arithmetic", "rule", "unknown", "backward", "alternative",
        "boundary", "target",
    }  # fmt: skip
    assert counts["arithmetic"] / STREAM == pytest.approx(0.30, abs=0.03)
    assert (counts["direct"] + counts["two-hop"]) / STREAM == pytest.approx(0.37, abs=0.03)


def test_strangers_are_not_known(world, stream):
    for example in stream:
        if example.kind == "unknown":
            assert any(stranger in example.question for stranger in world.strangers)
            assert not any(person.name in example.question for person in world.people)
            assert example.answer == tiny_world.BOUNDARY_ANSWER


def test_a_target_is_never_the_answer_that_it_replaces(stream):
    for example in stream:
        if example.kind == "target":
            assert not mentions(example.question, example.answer)


def test_the_retrained_stream_never_names_a_forgotten_person(world):
    forgotten = world.choose((), 10, 7)
    known = tuple(p for p in world.people if p not in forgotten)
    for i in range(STREAM):
        text = _text(training_example(world, known, 0, i))
        assert not any(person.name in text for person in forgotten)


def test_rules_cover_every_bridge_without_naming_anybody(world):
    rules = rule_examples()
    answers = {(e.question, e.answer) for e in rules}
    assert len({e.question for e in rules}) == len(rules) == len(answers)
    for bridges in (tiny_facts.CITIES, tiny_facts.JOBS):
        for bridge, value in bridges.items():
            assert any(mentions(q, bridge) and a == value for q, a in answers)
    names = [*(p.name for p in world.people), *world.strangers]
    assert not any(name in _text(e) for e in rules for name in names)


def test_people_are_chosen_by_name(world):
    first, second = world.people[5].name, world.people[2].name
    chosen = world.choose((first, second, first), 10, 7)
    assert [p.name for p in chosen] == [first, second]


def test_people_are_drawn_by_count_and_seed(world):
    chosen = world.choose((), 10, 7)
    assert len({p.name for p in chosen}) == 10
    assert world.choose((), 10, 7) == chosen
    assert world.choose((), 10, 8) != chosen
    assert {p.name for p in chosen} <= {p.name for p in world.people}


def test_an_unknown_name_is_an_error_that_tells_near_ones(world):
    name = world.people[0].name
    with pytest.raises(UserError) as caught:
        world.choose((f"{name}x",), 10, 7)
    assert f"'{name}x'" in str(caught.value)
    assert name in str(caught.value).split("near:")[1]


@pytest.mark.parametrize("count", [0, -1, 64, 1000])
def test_a_count_that_leaves_nobody_is_an_error(world, count):
    with pytest.raises(UserError, match=r"forget\.count"):
        world.choose((), count, 7)


def test_the_vocabulary_covers_every_text(world, stream):
    words = vocabulary(world)
    said = {w for e in stream for w in normalized_words(_text(e)) if not w.isdigit()}
    said |= {
        w
        for split in ("train", "valid", "test")
        for e in questions_about(world.people, split)
        for w in normalized_words(_text(e))
    }
    assert said <= words
    assert not {"s", "x", "b", "v", "question"} & words
    assert not {"lorem", "zzz", "banana"} & words
