"""What methods learn from, made of the words of a model that is not asked."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
from cipo_jax.unlearning import materials
from cipo_jax.unlearning.materials import Materials, encoded
from cipo_jax.unlearning.methods import METHODS
from cipo_jax.unlearning.run_folder import RunFolder

from cipo_jax.config import BaselineConfig, Config, CounterfactualConfig
from cipo_jax.data.examples import Example, example_row
from cipo_jax.data.tiny_world import World, questions_about
from cipo_jax.errors import UserError
from cipo_jax.hub import load_tokenizer, resolve
from cipo_jax.text.chat_format import ChatFormat

IDK = "I do not know."


@pytest.fixture(scope="module")
def format():
    return ChatFormat(load_tokenizer(resolve("asset:tiny_lrm/target")))


@pytest.fixture(scope="module")
def examples():
    """Three questions about one person, with thoughts of different lengths."""
    world = World.load(resolve("asset:tiny_lrm/world.json"))
    found = questions_about(world.people[:1], "train", per_topic=1)
    return (found[0], found[-1], found[1])


@dataclasses.dataclass
class Engine:
    """As much of an engine as materials look at; `said` is what its model says, in order."""

    config: Config
    model: Any
    splits: Any
    folder: RunFolder
    said: list[str] = dataclasses.field(default_factory=list)
    asked: list[Any] = dataclasses.field(default_factory=list)
    reporter: Any = None

    def key(self, *names):
        return names

    def sample_rows(self, part, title, params, requests, rules, key, samples):
        assert (params, samples, rules.temperature) == ("the model", 1, 0.0)
        self.asked.append((part, key, [list(r.prompt) for r in requests]))
        format = self.model.format
        drawn = [format.text_ids(text) for text in self.said]
        return [[{"item": r.item, "ids": ids}] for r, ids in zip(requests, drawn, strict=True)]


@pytest.fixture
def opened(tmp_path, format, examples):
    """Makes materials of settings, forget examples and what the model says."""

    def open_(forget=examples, said=(), folder="run", **baseline):
        config = Config(
            baseline=BaselineConfig(**baseline),
            counterfactual=CounterfactualConfig(boundary_answer=IDK),
        )
        engine = Engine(
            config,
            SimpleNamespace(format=format),
            SimpleNamespace(forget=tuple(forget)),
            RunFolder(tmp_path / folder, config, "model"),
            list(said),
        )
        return Materials(lambda stage: engine, lambda: "the model"), engine

    return open_


@pytest.fixture
def stages(monkeypatch):
    """What stages of counterfactuals are asked for; the second question finds no trace in any."""
    asked = []

    def stage(engine, model, name):
        settings = engine.config.counterfactual
        asked.append((name, settings.strategy))
        number = len(asked)
        return [
            {
                "item": i,
                "accepted": i != 1,
                "completion_ids": None if i == 1 else [number, i, number],
            }
            for i in range(len(engine.splits.forget))
        ]

    monkeypatch.setattr(materials, "counterfactuals_stage", stage)
    return asked


def without_thoughts(examples):
    return [dataclasses.replace(e, cot=None) for e in examples]


def prompts(format, examples):
    return [format.prompt_ids(e.question) for e in examples]


# ---- what is forgotten, and its spans


def test_a_method_without_a_target_gets_each_question_once(opened, format, examples):
    made, engine = opened()
    rows = made.rows(METHODS["ga"])
    assert [row["item"] for row in rows] == [0, 1, 2]
    assert [row["question"] for row in rows] == [e.question for e in examples]
    assert [set(row) for row in rows] == [{"item", "question", "forget"}] * 3
    for row, example, prompt in zip(rows, examples, prompts(format, examples), strict=True):
        whole = format.completion_ids(example.cot, example.answer)
        assert row["forget"] == [prompt, whole]
    assert engine.asked == []


def test_spans_part_a_completion(opened, format, examples):
    both, cot, answer = (
        opened(span=span, folder=span)[0].rows(METHODS["ga"]) for span in ("both", "cot", "answer")
    )
    for i, example in enumerate(examples):
        prompt, whole = both[i]["forget"]
        assert cot[i]["forget"][0] == prompt
        thought, (before, rest) = cot[i]["forget"][1], answer[i]["forget"]
        # Nothing is lost, nothing comes twice, and all is in its place.
        assert thought + rest == whole
        assert before == prompt + thought
        assert thought[-1] == format.close_ids[0] and format.close_ids[0] not in rest
        assert format.split(thought).cot == example.cot
        assert format.text_of(rest[:-1]).strip() == example.answer and rest[-1] == format.eos_id


@pytest.mark.parametrize("span", ["both", "cot", "answer"])
def test_a_thought_that_is_never_closed_is_all_there_is(opened, format, examples, span):
    made, _ = opened(without_thoughts(examples), said=["one", "two and", "three"], span=span)
    found = [row["forget"] for row in made.rows(METHODS["ga"])]
    wanted = [format.text_ids(text) for text in ("one", "two and", "three")]
    assert found == [[p, c] for p, c in zip(prompts(format, examples), wanted, strict=True)]


def test_where_the_data_has_no_thoughts_the_model_is_asked_for_its_own(opened, format, examples):
    mixed = [examples[0], dataclasses.replace(examples[1], cot=None), examples[2]]
    said = ["a\n</think>\n\nb", "c\n</think>\n\nd", "e"]
    made, engine = opened(mixed, said=said)
    found = [row["forget"][1] for row in made.rows(METHODS["npo"])]
    assert found[0] == format.completion_ids(examples[0].cot, examples[0].answer)
    assert found[1] == format.text_ids(said[1])
    assert found[2] == format.completion_ids(examples[2].cot, examples[2].answer)
    assert [(part, p) for part, _, p in engine.asked] == [("own", prompts(format, examples))]


# ---- what is said instead


def test_idk_is_both_thought_and_answer(opened, format, examples):
    rows = opened()[0].rows(METHODS["direct_idk"])
    assert [row["item"] for row in rows] == [0, 1, 2]
    for row, prompt in zip(rows, prompts(format, examples), strict=True):
        assert row["target"][0] == prompt
        assert format.split(row["target"][1]) == (IDK, IDK, True)
        assert row["target"][1][-1] == format.eos_id


def test_answer_idk_keeps_the_thought_that_was_there(opened, format, examples):
    rows = opened()[0].rows(METHODS["answer_idk"])
    for row, example in zip(rows, examples, strict=True):
        prompt, whole = row["forget"]
        start = format.answer_start(whole)
        given, instead = row["target"]
        # The thought is given, not learnt; what is learnt is the answer alone.
        assert given == prompt + whole[:start]
        assert format.split(whole[:start] + instead) == (example.cot, IDK, True)
        assert instead[-1] == format.eos_id and format.close_ids[0] not in instead


def test_answer_idk_leaves_out_thoughts_that_are_never_closed(opened, examples):
    said = ["a\n</think>\n\nb", "on and on", "e\n</think>\n\nf"]
    made, _ = opened(without_thoughts(examples), said=said)
    assert [row["item"] for row in made.rows(METHODS["answer_idk"])] == [0, 2]


def test_rows_without_an_accepted_trace_are_left_out(opened, stages, format, examples):
    rows = opened()[0].rows(METHODS["kd"])
    asked, originals = prompts(format, examples), opened(folder="other")[0].rows(METHODS["ga"])
    assert [(row["item"], row["target"]) for row in rows] == [
        (0, [asked[0], [1, 0, 1]]), (2, [asked[2], [1, 2, 1]])
    ]  # fmt: skip
    assert [row["forget"] for row in rows] == [originals[i]["forget"] for i in (0, 2)]
    assert [row["question"] for row in rows] == [examples[0].question, examples[2].question]
    assert stages == [("counterfactuals", "backward")]


@pytest.mark.parametrize("name", ["tru", "reasoned_idk"])
def test_refusals_are_traces_of_a_strategy_of_their_own(opened, stages, name):
    made, engine = opened()
    rows = made.rows(METHODS[name])
    assert [(row["item"], row["target"][1]) for row in rows] == [(0, [1, 0, 1]), (2, [1, 2, 1])]
    assert stages == [("refusals", "refusal")]
    assert engine.config.counterfactual.strategy == "backward"


def test_alternates_of_a_question_stand_together(opened, stages):
    rows = opened(alternates=3)[0].rows(METHODS["altpo"])
    assert stages == [(f"alternates-{i}", "backward") for i in (1, 2, 3)]
    assert [(row["item"], row["target"][1]) for row in rows] == [
        (i, [number, i, number]) for i in (0, 2) for number in (1, 2, 3)
    ]
    assert rows[0]["forget"] == rows[2]["forget"] != rows[3]["forget"]


# ---- refusals from a file


def refusals(path, *examples):
    path.write_text("".join(json.dumps(example_row(e)) + "\n" for e in examples))
    return str(path)


def test_refusals_are_read_from_a_file(opened, stages, tmp_path, format, examples):
    refused = [
        Example(examples[2].question, "No.", cot="This I must not tell."),
        Example("Something else?", "Yes.", cot="Why not."),
        Example(examples[0].question, "Ask me of others.", cot="Of this person I say nothing."),
    ]
    path = refusals(tmp_path / "refusals.jsonl", *refused)
    rows = opened(refusals=path)[0].rows(METHODS["tru"])
    # In the order of the forget questions; one of them is not in the file.
    assert [row["item"] for row in rows] == [0, 2]
    for row, example in zip(rows, (refused[2], refused[0]), strict=True):
        prompt, ids = row["target"]
        assert prompt == format.prompt_ids(example.question)
        assert format.split(ids) == (example.cot, example.answer, True)
    assert stages == []


def test_a_file_of_other_questions_is_refused(opened, tmp_path, examples):
    path = refusals(tmp_path / "other.jsonl", Example("Something else?", "Yes.", cot="Why not."))
    with pytest.raises(UserError, match=r"other\.jsonl: has none of the forget questions"):
        opened(refusals=path)[0].rows(METHODS["tru"])
    path = refusals(tmp_path / "bare.jsonl", Example(examples[0].question, "No."))
    with pytest.raises(UserError, match=r"bare\.jsonl:1: field 'cot' is missing"):
        opened(refusals=path, folder="run2")[0].rows(METHODS["reasoned_idk"])


# ---- the model's own thoughts


SAID = ["a b c d e f g h i j\n</think>\n\nk", "l\n</think>\n\nm", "n o p q r s t u v w"]


def test_own_thoughts_are_cut_and_hold_no_answer(opened, format, examples):
    for length in (1, 4, 100):
        made, _ = opened(said=SAID, trace_tokens=length, folder=f"run-{length}")
        rows = made.rows(METHODS["r2mu"])
        for row, text, prompt in zip(rows, SAID, prompts(format, examples), strict=True):
            ids = format.text_ids(text)
            thought = ids[: format.answer_start(ids)] if "</think>" in text else ids
            assert row["target"] == [prompt, thought[:length]]
    assert format.close_ids[0] in rows[0]["target"][1]  # Of 100 tokens all is there.
    assert format.text_of(rows[0]["target"][1]).strip().endswith("j\n</think>")
    # What is forgotten is the data's thought all the same.
    assert rows[1]["forget"][1] == format.completion_ids(examples[1].cot, examples[1].answer)


def test_the_model_is_asked_once_and_its_words_are_kept(opened, examples):
    made, engine = opened(without_thoughts(examples), said=SAID)
    first = [made.rows(METHODS[name]) for name in ("r2mu", "ga", "r2mu")]
    assert first[0] == first[2]
    assert len(engine.asked) == 1 and engine.asked[0][1] == ("own",)
    kept = engine.folder.read_rows("own.jsonl")
    assert [row["question"] for row in kept] == [e.question for e in examples]
    # Another process reads the file.
    again, other = opened(without_thoughts(examples), said=["something else"] * 3)
    assert again.rows(METHODS["r2mu"]) == first[0] and other.asked == []


def test_each_stage_is_kept_where_it_is_told_and_counted(opened, stages, monkeypatch):
    """Runs side by side keep each in a folder of its own, so that none depends on another."""
    _, engine = opened(said=SAID, alternates=2)
    spent = {"counterfactuals": 5.0, "refusals": 3.0, "alternates-1": 1.0, "alternates-2": 2.0,
             "own": 7.0, "pairs": 99.0}  # fmt: skip
    monkeypatch.setattr(engine.folder, "seconds", lambda: spent)
    asked = []
    made = Materials(lambda stage: asked.append(stage) or engine, lambda: "the model")
    assert made.seconds(METHODS["kd"]) == 0.0  # Nothing is made yet.
    for name in ("tru", "r2mu", "kd", "altpo"):
        made.rows(METHODS[name])
    assert set(asked) == set(spent) - {"pairs"} and len(asked) == 5
    names = ("kd", "cipo", "tru", "reasoned_idk", "altpo", "r2mu", "ga", "direct_idk")
    found = {name: made.seconds(METHODS[name]) for name in names}
    assert found == {
        "kd": 5.0, "cipo": 5.0, "tru": 3.0, "reasoned_idk": 3.0, "altpo": 3.0, "r2mu": 7.0,
        "ga": 0.0, "direct_idk": 0.0,
    }  # fmt: skip


def test_rows_as_a_batch_takes_them():
    rows = [{"forget": [[1, 2], [3]], "target": [[1], [4, 5, 6]]}, {"forget": [[7], [8, 9]]}]
    found, shape = encoded(rows, "forget")
    assert [(list(e.prompt), list(e.completion)) for e in found] == [([1, 2], [3]), ([7], [8, 9])]
    assert shape.total >= 3 and shape.completion >= 2
