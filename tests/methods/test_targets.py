"""What methods learn from, made of the words of a model that is not asked."""

import dataclasses
import json

import numpy as np
import pytest
from fake_run import open_fake_run

from cipo_jax.config import Config
from cipo_jax.data.examples import Example, example_row
from cipo_jax.errors import UserError
from cipo_jax.methods import targets
from cipo_jax.methods.counterfactual_records import (
    AcceptedTrace,
    Counterfactual,
    Counterfactuals,
)
from cipo_jax.methods.fixed_target import FixedTargetConfig, _batches, prepare_rows
from cipo_jax.methods.preference import PreferenceConfig
from cipo_jax.methods.refusal import RefusalConfig
from cipo_jax.methods.registry import METHODS
from cipo_jax.methods.representation import RepresentationConfig
from cipo_jax.methods.targets import OwnAnswer, OwnAnswers, original_completions
from cipo_jax.runs.data import RetainedExamples
from cipo_jax.shared_config import CounterfactualConfig, TrainConfig

IDK = "I do not know."


@pytest.fixture
def opened(tmp_path, chat, examples):
    """Opens a run with settings, forget examples and what the model says, in order."""

    def open_(forget=examples, said=None, folder="run", logp=None, **groups):
        config = Config(counterfactual=CounterfactualConfig(boundary_answer=IDK), **groups)
        given = {} if said is None else {"says": lambda job, request, sample: said[request.item]}
        given |= {} if logp is None else {"logp": logp}
        return open_fake_run(tmp_path / folder, chat, forget, config, **given)

    return open_


def rows_of(run, name):
    """The rows of a method, as its loop makes them."""
    method, originals = METHODS[name], original_completions(run)
    built = None if method.targets is None else method.targets.build(run, originals)
    span = run.config.group(FixedTargetConfig).span
    return prepare_rows(run, run.base, originals, built, span, False).rows


@pytest.fixture
def stages(monkeypatch):
    """What stages of counterfactuals are asked for; the second question finds no trace in any."""
    asked = []

    def stage(run, name="counterfactuals", settings=None):
        asked.append((name, settings.strategy))
        return traces(run, len(asked), settings.strategy)

    monkeypatch.setattr(targets, "counterfactuals", stage)
    return asked


def traces(run, number, strategy):
    """Counterfactuals whose completion ids are (number, item, number), but for the second."""
    found = []
    for i, question in enumerate(run.workspace.data.forget.questions):
        accepted = None if i == 1 else AcceptedTrace("t", "a", 1.0, -1.0, (number, i, number))
        example, prompt = question.example, tuple(question.prompt_ids)
        found.append(
            Counterfactual(
                i, example.question, example.answer, "a", "model", strategy, prompt, accepted, ()
            )
        )
    return Counterfactuals(len(found), tuple(found))


def without_thoughts(examples):
    return [dataclasses.replace(e, cot=None) for e in examples]


def prompts(chat, examples):
    return [tuple(chat.prompt_ids(e.question)) for e in examples]


# ---- what is forgotten, and its spans


def test_a_method_without_a_target_gets_each_question_once(opened, chat, examples):
    run = opened()
    rows = rows_of(run, "ga")
    assert [row.item for row in rows] == [0, 1, 2]
    assert [row.question for row in rows] == [e.question for e in examples]
    assert all(row.target is None and row.target_prompt_ids is None for row in rows)
    assert all(row.ref_forget_logp is None and row.ref_target_logp is None for row in rows)
    for row, example, prompt in zip(rows, examples, prompts(chat, examples), strict=True):
        assert row.forget_prompt_ids == prompt
        assert row.forget_ids == tuple(chat.completion_ids(example.cot, example.answer))
    assert run.workspace.sampler.jobs == []


def test_spans_part_a_completion(opened, chat, examples):
    both, cot, answer = (
        rows_of(opened(fixed_target=FixedTargetConfig(span=span), folder=span), "ga")
        for span in ("both", "cot", "answer")
    )
    for i, example in enumerate(examples):
        prompt, whole = both[i].forget
        assert cot[i].forget_prompt_ids == prompt
        thought, (before, rest) = cot[i].forget_ids, answer[i].forget
        # Nothing is lost, nothing comes twice, and all is in its place.
        assert thought + rest == whole
        assert before == prompt + thought
        assert thought[-1] == chat.close_ids[0] and chat.close_ids[0] not in rest
        assert chat.split(thought).cot == example.cot
        assert chat.text_of(rest[:-1]).strip() == example.answer and rest[-1] == chat.eos_id


@pytest.mark.parametrize("span", ["both", "cot", "answer"])
def test_a_thought_that_is_never_closed_is_all_there_is(opened, chat, examples, span):
    said = ["one", "two and", "three"]
    run = opened(without_thoughts(examples), said, fixed_target=FixedTargetConfig(span=span))
    found = [tuple(row.forget) for row in rows_of(run, "ga")]
    wanted = [tuple(chat.text_ids(text)) for text in said]
    assert found == list(zip(prompts(chat, examples), wanted, strict=True))


def test_where_the_data_has_no_thoughts_the_model_is_asked_for_its_own(opened, chat, examples):
    mixed = [examples[0], dataclasses.replace(examples[1], cot=None), examples[2]]
    said = ["a\n</think>\n\nb", "c\n</think>\n\nd", "e"]
    run = opened(mixed, said)
    found = [row.forget_ids for row in rows_of(run, "npo")]
    assert found[0] == tuple(chat.completion_ids(examples[0].cot, examples[0].answer))
    assert found[1] == tuple(chat.text_ids(said[1]))
    assert found[2] == tuple(chat.completion_ids(examples[2].cot, examples[2].answer))
    (job,) = run.workspace.sampler.jobs
    assert [tuple(r.prompt) for r in job.requests] == prompts(chat, examples)
    assert (job.num_samples, job.sampling_params.temperature) == (1, 0.0)


# ---- what is said instead


def test_idk_is_both_thought_and_answer(opened, chat, examples):
    rows = rows_of(opened(), "direct_idk")
    assert [row.item for row in rows] == [0, 1, 2]
    for row, prompt in zip(rows, prompts(chat, examples), strict=True):
        assert row.target_prompt_ids == prompt
        assert chat.split(row.target_ids) == (IDK, IDK, True)
        assert row.target_ids[-1] == chat.eos_id


def test_answer_idk_keeps_the_thought_that_was_there(opened, chat, examples):
    rows = rows_of(opened(), "answer_idk")
    for row, example in zip(rows, examples, strict=True):
        prompt, whole = row.forget
        start = chat.answer_start(whole)
        given, instead = row.target
        # The thought is given, not learnt; what is learnt is the answer alone.
        assert given == prompt + whole[:start]
        assert chat.split(whole[:start] + instead) == (example.cot, IDK, True)
        assert instead[-1] == chat.eos_id and chat.close_ids[0] not in instead


def test_answer_idk_leaves_out_thoughts_that_are_never_closed(opened, examples):
    said = ["a\n</think>\n\nb", "on and on", "e\n</think>\n\nf"]
    rows = rows_of(opened(without_thoughts(examples), said), "answer_idk")
    assert [row.item for row in rows] == [0, 2]


def test_rows_without_an_accepted_trace_are_left_out(opened, stages, chat, examples):
    rows = rows_of(opened(), "kd")
    asked, originals = prompts(chat, examples), rows_of(opened(folder="other"), "ga")
    assert [(row.item, tuple(row.target)) for row in rows] == [
        (0, (asked[0], (1, 0, 1))), (2, (asked[2], (1, 2, 1)))
    ]  # fmt: skip
    assert [row.forget for row in rows] == [originals[i].forget for i in (0, 2)]
    assert [row.question for row in rows] == [examples[0].question, examples[2].question]
    assert stages == [("counterfactuals", "backward")]


@pytest.mark.parametrize("name", ["tru", "reasoned_idk"])
def test_refusals_are_traces_of_a_strategy_of_their_own(opened, stages, name):
    run = opened()
    rows = rows_of(run, name)
    assert [(row.item, row.target_ids) for row in rows] == [(0, (1, 0, 1)), (2, (1, 2, 1))]
    assert stages == [("refusals", "refusal")]
    assert run.config.counterfactual.strategy == "backward"


def test_alternates_of_a_question_stand_together(opened, stages):
    rows = rows_of(opened(preference=PreferenceConfig(num_alternates=3)), "altpo")
    assert stages == [(f"alternates-{i}", "backward") for i in (1, 2, 3)]
    assert [(row.item, row.target_ids) for row in rows] == [
        (i, (number, i, number)) for i in (0, 2) for number in (1, 2, 3)
    ]
    assert rows[0].forget == rows[2].forget != rows[3].forget


# ---- refusals from a file


def refusals(path, *examples):
    path.write_text("".join(json.dumps(example_row(e)) + "\n" for e in examples))
    return RefusalConfig(path=str(path))


def test_refusals_are_read_from_a_file(opened, stages, tmp_path, chat, examples):
    refused = [
        Example(examples[2].question, "No.", cot="This I must not tell."),
        Example("Something else?", "Yes.", cot="Why not."),
        Example(examples[0].question, "Ask me of others.", cot="Of this person I say nothing."),
    ]
    given = refusals(tmp_path / "refusals.jsonl", *refused)
    rows = rows_of(opened(refusal=given), "tru")
    # In the order of the forget questions; one of them is not in the file.
    assert [row.item for row in rows] == [0, 2]
    for row, example in zip(rows, (refused[2], refused[0]), strict=True):
        assert row.target_prompt_ids == tuple(chat.prompt_ids(example.question))
        assert chat.split(row.target_ids) == (example.cot, example.answer, True)
    assert stages == []


def test_a_file_of_other_questions_is_refused(opened, tmp_path, examples):
    given = refusals(tmp_path / "other.jsonl", Example("Something else?", "Yes.", cot="Why not."))
    with pytest.raises(UserError, match=r"other\.jsonl: has none of the forget questions"):
        rows_of(opened(refusal=given), "tru")
    given = refusals(tmp_path / "bare.jsonl", Example(examples[0].question, "No."))
    with pytest.raises(UserError, match=r"bare\.jsonl:1: field 'cot' is missing"):
        rows_of(opened(refusal=given, folder="run2"), "reasoned_idk")


# ---- the model's own thoughts


SAID = ["a b c d e f g h i j\n</think>\n\nk", "l\n</think>\n\nm", "n o p q r s t u v w"]


def test_own_thoughts_are_cut_and_hold_no_answer(opened, chat, examples):
    for length in (1, 4, 100):
        settings = RepresentationConfig(trace_tokens=length)
        rows = rows_of(opened(said=SAID, representation=settings, folder=f"run-{length}"), "r2mu")
        for row, text, prompt in zip(rows, SAID, prompts(chat, examples), strict=True):
            ids = tuple(chat.text_ids(text))
            thought = ids[: chat.answer_start(ids)] if "</think>" in text else ids
            assert tuple(row.target) == (prompt, thought[:length])
    assert chat.close_ids[0] in rows[0].target_ids  # Of 100 tokens all is there.
    assert chat.text_of(rows[0].target_ids).strip().endswith("j\n</think>")
    # What is forgotten is the data's thought all the same.
    assert rows[1].forget_ids == tuple(chat.completion_ids(examples[1].cot, examples[1].answer))


def test_the_model_is_asked_once_and_its_words_are_kept(opened, examples):
    run = opened(without_thoughts(examples), SAID)
    first = [rows_of(run, name) for name in ("r2mu", "ga", "r2mu")]
    assert first[0] == first[2]
    assert len(run.workspace.sampler.jobs) == 1
    kept = [json.loads(line) for line in (run.folder / "own.jsonl").read_text().splitlines()]
    assert [row["question"] for row in kept] == [e.question for e in examples]
    # Another process reads the file.
    again = opened(without_thoughts(examples), ["something else"] * 3)
    assert rows_of(again, "r2mu") == first[0] and again.workspace.sampler.jobs == []


def test_own_thoughts_are_drawn_with_a_key_of_their_own(opened, examples):
    run = opened(without_thoughts(examples), SAID)
    rows_of(run, "ga")
    (job,) = run.workspace.sampler.jobs
    assert job.key == run.key("own") != run.key("rollouts")


class Owner:
    """A run that keeps stages of others."""

    def __init__(self, run):
        self.run, self.kept, self.state = run, [], run.state

    def stage(self, name, function, *inputs):
        self.kept.append(name)
        if name == "own":
            answers = [OwnAnswer("q", "c", "a", True, (1, 2)) for _ in range(3)]
            return OwnAnswers(tuple(answers))
        return traces(self.run, 1, inputs[-1].strategy)


def test_each_stage_is_kept_where_it_is_told(opened):
    """Runs side by side keep each in a folder of its own, so that none depends on another."""
    run, found = opened(said=SAID, preference=PreferenceConfig(num_alternates=2)), {}
    for name in ("kd", "tru", "reasoned_idk", "altpo", "r2mu", "ga", "direct_idk"):
        owner = Owner(run)
        rows_of(run.shared(lambda stage, owner=owner: owner), name)
        found[name] = owner.kept
    assert found == {
        "kd": ["counterfactuals"], "tru": ["refusals"], "reasoned_idk": ["refusals"],
        "altpo": ["alternates-1", "alternates-2"], "r2mu": ["own"], "ga": [], "direct_idk": [],
    }  # fmt: skip


# ---- rows


def test_reference_log_probabilities_are_sums_over_completions(opened, chat, examples):
    run = opened(logp=lambda prompt, completion: [-0.5] * len(completion))
    originals = original_completions(run)
    built = METHODS["idk_dpo"].targets.build(run, originals)
    rows = prepare_rows(run, run.base, originals, built, "both", True).rows
    for row in rows:
        assert row.ref_forget_logp == pytest.approx(-0.5 * len(row.forget_ids))
        assert row.ref_target_logp == pytest.approx(-0.5 * len(row.target_ids))
    alone = prepare_rows(run, run.base, originals, None, "both", True).rows
    assert [row.ref_forget_logp for row in alone] == [row.ref_forget_logp for row in rows]
    assert all(row.ref_target_logp is None for row in alone)


def test_batches_hold_the_sides_of_a_row_beside_each_other(opened, chat):
    settings = TrainConfig(epochs=1.0, batch_size=3, retain_batch_size=2)
    run = opened(train=settings, logp=lambda prompt, completion: [-1.0] * len(completion))
    originals = original_completions(run)
    built = METHODS["direct_idk"].targets.build(run, originals)
    rows = prepare_rows(run, run.base, originals, built, "both", True)
    retained = RetainedExamples(tuple(originals), ())
    batches = _batches(run, rows, retained, 1)
    assert batches.num_steps == 1
    batch = batches.at(0)
    assert set(batch) == {"forget", "target", "ref_forget", "ref_target", "retain"}
    by_length = {len(row.forget_ids): row for row in rows.rows}
    assert len(by_length) == 3
    for i, length in enumerate(batch["forget"].lengths):
        row = by_length[int(length)]
        for side, wanted in (("forget", row.forget), ("target", row.target)):
            start, end = int(batch[side].prompt_lengths[i]), int(batch[side].lengths[i])
            assert tuple(batch[side].tokens[i, :start]) == wanted.prompt
            assert tuple(batch[side].completions[i, :end]) == wanted.completion
        assert batch["ref_forget"][i] == row.ref_forget_logp
        assert batch["ref_target"][i] == row.ref_target_logp
    assert batch["ref_forget"].dtype == np.float32
    again = _batches(run, rows, retained, 1).at(0)
    np.testing.assert_array_equal(again["forget"].tokens, batch["forget"].tokens)
    without = _batches(run, rows, None, 2)
    assert set(without.at(0)) == {"forget", "target", "ref_forget", "ref_target"}
