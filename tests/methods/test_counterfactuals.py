"""Counterfactuals, made of the words of a model that is not asked."""

import dataclasses
import json

import pytest
from fake_run import MODEL, open_fake_run

from cipo_jax.config import Config
from cipo_jax.data.examples import Example
from cipo_jax.errors import UserError
from cipo_jax.methods.counterfactuals import counterfactuals, written_examples
from cipo_jax.shared_config import CounterfactualConfig

PROMPTS = {
    "target_prompt": "Name another: {question} Not {answer}.",
    "backward_prompt": "Reason: {question} It is {answer}.",
    "alternative_prompt": "Another path: {question} It is {answer}.",
    "boundary_prompt": "Beyond you: {question} Say {answer}",
    "refusal_prompt": "Refuse: {question} Say {answer}",
}
ADA = Example("Where was Ada born?", "Lisbon", cot="I recall.", group="Ada")
AGAIN = Example("Ada was born where?", "Lisbon", cot="I recall.", group="Ada")
BO = Example("Where does Bo live?", "Porto", cot="I recall.")


def text(cot, answer):
    return f"{cot}\n</think>\n\n{answer}"


@pytest.fixture
def opened(tmp_path, chat):
    """Opens a run whose model says what `targets` and `traces` of (prompt, sample) give."""

    def open_(examples, targets=None, traces=None, folder="run", **settings):
        values = {"num_candidates": 2, "rounds": 2, "min_gain": 0.5} | PROMPTS | settings
        config = Config(counterfactual=CounterfactualConfig(**values))
        seen = []

        def says(job, request, sample):
            prompt = chat.text_of(request.prompt)
            kind = targets if "Name another" in prompt else traces
            seen.append((prompt, sample))
            return kind(prompt, sample)

        def logp(prompt, completion):  # With a trace the answer is more likely than without.
            start = chat.answer_start(completion)
            likely = -0.1 if start > len(chat.close_ids) else -2.0
            return [-1.0] * start + [likely] * (len(completion) - start)

        run = open_fake_run(tmp_path / folder, chat, examples, config, says, logp)
        return run, seen

    return open_


def oslo(prompt, sample):
    return text("Let me think", "Oslo")


def reasoned(prompt, sample):
    return text(f"Number {sample} leads me to Oslo", "Oslo")


def test_questions_of_one_group_get_one_target_and_each_a_trace(opened, chat):
    run, seen = opened([ADA, AGAIN, BO], oslo, reasoned)
    made = counterfactuals(run)
    assert [c.item for c in made.questions] == [0, 1, 2]
    assert [c.target_answer for c in made.questions] == ["Oslo"] * 3
    assert {c.target_source for c in made.questions} == {"model"}
    assert made.accepted == made.questions and made.without_trace == ()
    assert made.candidates == 6
    named = [p for p, _ in seen if "Name another" in p]
    # Two samples for the first of the group and for the other question.
    assert len(named) == 4 and "Ada was born where?" not in "".join(named)
    assert "Name another: Where was Ada born? Not Lisbon." in named[0]
    assert any("Reason: Ada was born where? It is Oslo." in p for p, _ in seen)
    first = made.questions[0]
    assert first.prompt_ids == tuple(chat.prompt_ids(ADA.question))
    assert (first.question, first.true_answer, first.strategy) == (ADA.question, "Lisbon",
                                                                   "backward")  # fmt: skip
    tokens = first.tokenized()
    assert tuple(tokens.prompt) == first.prompt_ids
    assert chat.split(tokens.completion).answer == "Oslo"
    assert len(first.rejected) == 1


def test_a_target_that_the_data_gives_is_not_asked_for(opened):
    given = dataclasses.replace(ADA, target_answer="Oslo")
    run, seen = opened([given], traces=reasoned)
    (made,) = counterfactuals(run).questions
    assert (made.target_answer, made.target_source) == ("Oslo", "given")
    assert len(seen) == 2 and all("Reason:" in prompt for prompt, _ in seen)


def test_a_given_target_that_leaks_is_refused(opened):
    given = dataclasses.replace(ADA, target_answer="Lisbon, I think")
    run, _ = opened([BO, given], oslo, reasoned)
    with pytest.raises(UserError, match=r"forget row 2: field 'target_answer' = .* 'Lisbon'"):
        counterfactuals(run)


@pytest.mark.parametrize(
    ("strategy", "target"),
    [("boundary", "I do not know."), ("refusal", "I cannot answer this.")],
)
def test_a_strategy_may_set_the_target(opened, strategy, target):
    def traces(prompt, sample):
        return text(f"This number {sample} is beyond me", target)

    given = dataclasses.replace(ADA, target_answer="Oslo")
    run, seen = opened([given], traces=traces, strategy=strategy)
    (made,) = counterfactuals(run).questions
    assert (made.target_answer, made.target_source, made.strategy) == (target, "strategy", strategy)
    assert all(PROMPTS[f"{strategy}_prompt"].split("{")[0] in prompt for prompt, _ in seen)


@pytest.mark.parametrize(
    "bad",
    [
        text("So", "Lisbon"), text("So", ""), "Oslo", text("So", "Oslo..."),
        text("So", "a b c d e"),
    ],
    ids=["leaks", "empty", "unclosed", "cut off", "too long"],
)  # fmt: skip
def test_a_target_has_to_be_short_whole_and_clean(opened, bad):
    def targets(prompt, sample):
        return bad if sample == 0 else text("So", "Oslo")

    run, _ = opened([ADA], targets, reasoned, max_target_words=4)
    (made,) = counterfactuals(run).questions
    assert made.target_answer == "Oslo" and made.accepted is not None


def test_a_group_without_a_trace_gets_another_target_and_another_try(opened):
    def targets(prompt, sample):
        return text("So", ("Bergen", "Oslo")[sample])

    def traces(prompt, sample):
        place = "Bergen" if "Bergen" in prompt else "Oslo"
        if place == "Bergen" or "Where was" in prompt:
            return text("no", place)  # Hardly a word of reasoning.
        return reasoned(prompt, sample)

    run, _ = opened([ADA, AGAIN], targets, traces)
    made = counterfactuals(run)
    # Bergen is taken at first; at the second try it may not be named again.
    assert [c.target_answer for c in made.questions] == ["Oslo", "Oslo"]
    assert [c.item for c in made.accepted] == [1]
    assert [c.item for c in made.without_trace] == [0]
    first = made.questions[0]
    assert [r.target_answer for r in first.rejected] == ["Bergen"] * 2 + ["Oslo"] * 2
    assert first.rejected[0].why == ("degenerate: hardly a word of reasoning",)
    assert made.candidates == 8
    keys = [job.key for job in run.workspace.sampler.jobs]
    assert len({str(key) for key in keys}) == 4
    assert keys[2] == run.key("targets", 1) and keys[3] == run.key("traces", 1)


def test_what_is_found_is_kept_and_not_asked_for_again(opened):
    run, _ = opened([ADA, BO], oslo, reasoned)
    first = counterfactuals(run)
    again, seen = opened([ADA, BO], oslo, reasoned)
    assert counterfactuals(again) == first and seen == []
    rows = [json.loads(x) for x in (run.folder / "counterfactuals.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == [ADA.question, BO.question]
    assert rows[0]["accepted"]["answer"] == "Oslo"


def test_stages_of_other_names_draw_other_numbers(opened):
    run, _ = opened([ADA], oslo, reasoned)
    counterfactuals(run)
    counterfactuals(run, "alternates-1")
    keys = [job.key for job in run.workspace.sampler.jobs]
    assert keys[:2] == [run.key("targets", 0), run.key("traces", 0)]
    wanted = [run.key("alternates-1", "targets", 0), run.key("alternates-1", "traces", 0)]
    assert keys[2:] == wanted


def test_a_run_without_one_trace_ends(opened):
    def traces(prompt, sample):
        return text("no", "Oslo")

    run, _ = opened([ADA, BO], oslo, traces)
    with pytest.raises(UserError, match=r"not one of 2 questions .* \(the first: degenerate"):
        counterfactuals(run)
    run, _ = opened([ADA], lambda prompt, sample: text("So", "Lisbon"), folder="other")
    with pytest.raises(UserError, match="no target answer was found"):
        counterfactuals(run)


def test_what_came_out_well_teaches_how_to_write(opened):
    run, _ = opened([ADA, BO], oslo, reasoned)
    questions = run.workspace.data.forget.questions
    # As inside of a stage.
    inside = dataclasses.replace(run, prefix="skills")
    found = written_examples(inside, MODEL, questions, run.config.counterfactual)
    assert [(e.about, e.question.split(":")[0]) for e in found] == [
        (ADA.question, "Name another"), (ADA.question, "Reason"),
        (BO.question, "Name another"), (BO.question, "Reason"),
    ]  # fmt: skip
    assert (found[0].cot, found[0].answer) == ("Let me think", "Oslo")
    assert found[1].answer == "Oslo" and "leads me to" in found[1].cot
