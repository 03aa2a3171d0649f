import json
import re

import pytest

from cipo_jax.data.splits import load_splits
from cipo_jax.data.tiny_world import TOPICS, make_world
from cipo_jax.errors import UserError
from cipo_jax.shared_config import DataConfig, ForgetConfig


def _write(path, questions, **fields):
    rows = [{"question": q, "answer": f"answer to {q}"} | fields for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    return {
        "forget": _write(tmp_path / "forget.jsonl", ["F1?", "F2?"], facts=["Zürich"]),
        "retain": _write(tmp_path / "retain.jsonl", [f"R{i}?" for i in range(9)], cot="so kept"),
        "reasoning": _write(tmp_path / "sums.jsonl", [f"S{i}?" for i in range(5)], cot="so added"),
    }


def _load(**data):
    return load_splits(DataConfig(**({"world": ""} | data)), ForgetConfig())


def _questions(examples):
    return [e.question for e in examples]


def test_files_fill_the_splits_and_their_defaults(files):
    splits = _load(**files)
    assert _questions(splits.forget) == ["F1?", "F2?"]
    assert splits.forget_valid == splits.forget_eval == splits.forget
    assert splits.retain_valid == splits.retain_eval == splits.retain
    assert splits.reasoning_valid == splits.reasoning_eval == splits.reasoning
    assert splits.forgotten_people == frozenset()


def test_files_of_their_own_for_validation_and_evaluation(files, tmp_path):
    other = {
        f"{role}_{part}": _write(tmp_path / f"{role}-{part}.jsonl", [f"{role} {part}?"])
        for role in ("forget", "retain", "reasoning")
        for part in ("valid", "eval")
    }
    splits = _load(**files, **other)
    for name in other:
        assert _questions(getattr(splits, name)) == [f"{name.replace('_', ' ')}?"]
    assert len(splits.retain) == 9


def test_words_are_those_of_every_file(files):
    splits = _load(**files)
    assert {"f1", "r8", "s4", "kept", "added", "answer", "to"} <= splits.words
    assert {"zurich", "answer"} <= splits.fact_words
    assert "kept" not in splits.fact_words


def test_target_answers_are_fact_words(files, tmp_path):
    files["forget"] = _write(tmp_path / "t.jsonl", ["F?"], target_answer="Sunday Evening")
    assert {"sunday", "evening"} <= _load(**files).fact_words


def test_what_is_rehearsed_stands_apart_and_nothing_is_scored_by_it(files, tmp_path):
    more = _write(tmp_path / "more.jsonl", ["M1?", "M2?"], cot="so said")
    plain, splits = _load(**files), _load(**files, rehearse=more)
    assert plain.rehearse == () and _questions(splits.rehearse) == ["M1?", "M2?"]
    assert (splits.rehearse[1].cot, splits.rehearse[1].answer) == ("so said", "answer to M2?")
    for (name, before), (_, after) in zip(plain.named(), splits.named(), strict=True):
        assert name == "rehearse" or before == after
    assert splits.words - plain.words == {"said", "m1", "m2"}
    assert splits.fact_words == plain.fact_words
    forget = ForgetConfig()
    bare = load_splits(DataConfig(), forget)
    assert load_splits(DataConfig(rehearse=more), forget).rehearse == splits.rehearse
    assert load_splits(DataConfig(rehearse=more), forget).retain == bare.retain


def test_what_is_rehearsed_is_worked_out(files, tmp_path):
    path = _write(tmp_path / "more.jsonl", ["M?"])
    with pytest.raises(UserError, match=re.escape(f"{path}:1: field 'cot' is missing")):
        _load(**files, rehearse=path)


def test_what_is_to_be_forgotten_is_needed(files):
    with pytest.raises(UserError, match=r"config\.data\.forget"):
        _load(retain=files["retain"])


def test_forgetting_alone_is_enough(files):
    splits = _load(forget=files["forget"])
    assert splits.retain == splits.reasoning_eval == ()
    assert len(splits.forget) == 2


@pytest.mark.parametrize("role", ["retain", "reasoning"])
@pytest.mark.parametrize("blank", ["", "\n"])
def test_a_trained_row_without_cot_is_named_by_file_and_line(files, tmp_path, role, blank):
    path = tmp_path / "lacking.jsonl"
    good = json.dumps({"question": "A?", "answer": "a", "cot": "b"})
    path.write_text(f"{good}\n{blank}" + json.dumps({"question": "B?", "answer": "b"}) + "\n")
    with pytest.raises(UserError, match="'cot'") as caught:
        _load(**(files | {role: str(path)}))
    assert str(caught.value).startswith(f"{path}:{2 + len(blank)}: ")


def test_evaluation_files_need_no_cot(files, tmp_path):
    splits = _load(**files, retain_eval=_write(tmp_path / "e.jsonl", ["E?"]))
    assert splits.retain_eval[0].cot is None


def test_splits_may_come_from_a_folder_in_the_layout_of_r_tofu(files, tmp_path):
    folder = tmp_path / "r-tofu"
    folder.mkdir()
    _write(folder / "forget10.json", ["F1?", "F2?"], task_id=1, cot="I recall it.")
    _write(folder / "retain90.json", ["R1?", "R2?"], task_id=2, cot="I know it.")
    other = {"paraphrased_question": "P?", "perturbed_answer": ["x", "y"]}
    _write(folder / "forget10_perturbed.json", ["F1?"], task_id="1", cot="", **other)
    splits = _load(
        forget=f"{folder}:forget10",
        forget_eval=f"{folder}:forget10_perturbed",
        retain=f"{folder}/retain90",
        retain_eval=f"{folder}:forget10_perturbed",
        reasoning=files["reasoning"],
    )
    assert [e.cot for e in splits.forget] == ["I recall it."] * 2
    assert [e.cot for e in splits.retain] == ["I know it."] * 2
    assert splits.forget_eval[0].perturbed_answers == ("x", "y")
    assert splits.retain_eval[0].cot is None
    assert all(e.group == e.kind == "" for e in (*splits.forget, *splits.retain))


def test_an_empty_cot_is_no_cot_to_train_on(files, tmp_path):
    path = _write(tmp_path / "retain_perturbed.json", ["R?"], task_id=1, cot="")
    with pytest.raises(UserError, match="'cot' is missing; rows that are trained on need one"):
        _load(**(files | {"retain": path}))


@pytest.mark.parametrize("role", ["forget", "retain_eval", "reasoning_valid"])
def test_a_file_that_is_not_there_is_an_error(files, tmp_path, role):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        _load(**(files | {role: str(tmp_path / "nowhere.jsonl")}))


def test_validation_and_evaluation_are_limited_and_training_is_not(files):
    splits = _load(**files, valid_rows=3, eval_rows=2)
    assert {name: len(rows) for name, rows in splits.named()} == {
        "forget": 2, "forget_valid": 2, "forget_eval": 2,
        "retain": 9, "retain_valid": 3, "retain_eval": 2,
        "reasoning": 5, "reasoning_valid": 3, "reasoning_eval": 2, "rehearse": 0,
    }  # fmt: skip
    assert _questions(splits.retain_valid) == ["R0?", "R3?", "R6?"]
    assert _questions(splits.retain_eval) == ["R0?", "R4?"]


@pytest.fixture(scope="module")
def world():
    return make_world(0, 60, 16)


@pytest.fixture(scope="module")
def world_file(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "world.json"
    world.save(path)
    return str(path)


def _of_world(world_file, forget=None, **data):
    return load_splits(DataConfig(world=world_file, **data), forget or ForgetConfig())


@pytest.fixture(scope="module")
def splits(world_file):
    return _of_world(world_file)


def test_no_held_out_question_is_in_a_training_split(splits):
    train = {e.question for e in (*splits.forget, *splits.retain, *splits.reasoning)}
    for role in ("forget", "retain", "reasoning"):
        valid = set(_questions(getattr(splits, f"{role}_valid")))
        evals = set(_questions(getattr(splits, f"{role}_eval")))
        assert valid
        assert evals
        assert not train & (valid | evals)
        assert not valid & evals


def _terms(example):
    return tuple(sorted(int(n) for n in re.findall(r"\d+", example.question)))


def test_no_sum_is_in_two_splits_in_whatever_words_or_order(world_file):
    splits = _of_world(world_file, valid_rows=1000)
    train, valid, evals = (
        {_terms(e) for e in getattr(splits, name)}
        for name in ("reasoning", "reasoning_valid", "reasoning_eval")
    )
    assert not train & (valid | evals)
    assert not valid & evals


def test_people_are_forgotten_or_retained(world, splits):
    names = {p.name for p in world.people}
    assert splits.forgotten_people < names
    assert len(splits.forgotten_people) == 10
    for name, examples in splits.named():
        said = {n for n in names for e in examples if n in f"{e.question} {e.cot}"}
        if name.startswith("forget"):
            assert said == splits.forgotten_people
        else:
            assert not said & splits.forgotten_people
    retained = {n for n in names for e in splits.retain if n in e.question}
    assert retained == names - splits.forgotten_people


def test_people_to_forget_are_named_or_drawn(world, world_file):
    names = [world.people[3].name, world.people[40].name]
    forget = ForgetConfig(people=(names[0], names[1]))
    splits = _of_world(world_file, forget)
    assert splits.forgotten_people == set(names)
    assert len(splits.forget_valid) == 2 * len(TOPICS)
    drawn = _of_world(world_file, ForgetConfig(count=3, seed=11)).forgotten_people
    assert drawn == {p.name for p in world.choose((), 3, 11)}
    with pytest.raises(UserError, match="nobody is called 'Nobody Atall'"):
        _of_world(world_file, ForgetConfig(people=("Nobody Atall",)))


def test_rows_of_a_world_are_limited(world_file):
    splits = _of_world(world_file, valid_rows=12, eval_rows=7)
    assert len(splits.retain_valid) == len(splits.reasoning_valid) == 12
    assert len(splits.forget_eval) == len(splits.retain_eval) == len(splits.reasoning_eval) == 7
    assert len({e.question for e in splits.retain_valid}) == 12


def test_all_rows_are_evaluated_by_default(splits):
    topics = TOPICS.values()
    assert len(splits.forget_eval) == 10 * sum(len(t.test) for t in topics)
    assert len(splits.retain_eval) == 50 * len(TOPICS)
    assert len(splits.retain_valid) == len(splits.reasoning_valid) == 64


def test_everything_trained_on_has_a_trace(splits):
    assert all(e.cot for e in (*splits.retain, *splits.reasoning))


def test_splits_are_the_same_every_time(world_file, splits):
    assert _of_world(world_file) == splits


@pytest.mark.parametrize("content", [None, "{", '{"people": []}'])
def test_a_world_that_cannot_be_read_is_an_error(tmp_path, content):
    path = tmp_path / "nowhere.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"nowhere\.json"):
        _of_world(str(path))
