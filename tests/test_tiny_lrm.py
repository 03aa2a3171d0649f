"""The models that ship know what they should, in phrasings and sums they were never shown."""

import jax
import pytest

from cipo_jax.data import tiny_world
from cipo_jax.evals.evaluate import encode_questions, graded
from cipo_jax.evals.leakage import share
from cipo_jax.hub import resolve
from cipo_jax.language_model import LanguageModel
from cipo_jax.models.pretrained import PretrainedFolder
from cipo_jax.text.matching import mentions
from cipo_jax.training.mesh import make_mesh


@pytest.fixture(scope="module")
def world():
    return tiny_world.World.load(resolve("asset:tiny_lrm/world.json"))


@pytest.fixture(scope="module")
def ask():
    """A function from (model name, examples) to graded greedy generations."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    loaded = {}

    def ask(name, examples):
        if name not in loaded:
            model = LanguageModel.from_pretrained(f"asset:tiny_lrm/{name}", mesh)
            sampler = model.sampler(max_batch_size=128)
            loaded[name] = model.chat, sampler, sampler.prepare(model.params)
        chat, sampler, params = loaded[name]
        questions = encode_questions(chat, {"forget": examples})
        found = dict(graded(sampler, chat, params, questions, max_new_tokens=96))
        return [found[i] for i in range(len(examples))]

    return ask


def test_the_world_is_the_one_that_the_generator_makes(world):
    assert world == tiny_world.make_world(world.seed, len(world.people), len(world.strangers))


def test_the_target_recalls_everyone_in_phrasings_it_never_saw(world, ask):
    examples = tiny_world.questions_about(world.people, "test")
    rows = ask("target", examples)
    by_name = {p.name: p for p in world.people}
    recalled = []
    for example, row in zip(examples, rows, strict=True):
        name, noun = example.group.split(", ")
        (topic,) = [t for t in tiny_world.TOPICS.values() if t.noun == noun]
        needed = [example.answer]
        if topic.bridge:  # A two-hop trace has to pass through it.
            needed.append(by_name[name].facts[topic.bridge])
        recalled.append(all(mentions(row.cot, fact) for fact in needed))
    assert share([r.closed for r in rows]) >= 0.99
    assert share([r.correct for r in rows]) >= 0.97
    assert share(recalled) >= 0.97


@pytest.mark.parametrize("name", ["target", "retrained"])
def test_both_solve_sums_that_no_training_step_saw(name, ask):
    rows = ask(name, tiny_world.sums(128, seed=99, held_out=True))
    assert share([r.correct for r in rows]) >= 0.90


def test_the_retrained_model_never_saw_the_default_forget_set(world, ask):
    model = PretrainedFolder.open("asset:tiny_lrm/retrained")
    forgotten = world.choose((), 10, 7)
    assert model.never_saw() == [p.name for p in forgotten]
    rows = ask("retrained", tiny_world.questions_about(forgotten, "test"))
    # It guesses now and then, and a guess is right now and then.
    assert share([bool(r.answer_leaks) for r in rows]) <= 0.10
    others = [p for p in world.people if p not in forgotten]
    known = ask("retrained", tiny_world.questions_about(others[:20], "test", per_topic=1))
    assert share([r.correct for r in known]) >= 0.97


def test_the_target_reasons_backward_to_any_stated_answer(world, ask):
    examples = []
    for person in world.people[:24]:
        topic = tiny_world.TOPICS["city"]
        other = "Porto" if person.facts["city"] != "Porto" else "Lima"
        question = topic.train[0].format(x=person.name)
        prompt = tiny_world.BACKWARD_PROMPT.format(question=question, answer=other)
        facts = (person.facts["city"],)
        examples.append(tiny_world.Example(prompt, other, facts=facts))
    rows = ask("target", examples)
    assert share([r.correct for r in rows]) >= 0.95
    assert share([len(r.cot_leaks) == 1 for r in rows]) >= 0.95  # the stated answer, no more
