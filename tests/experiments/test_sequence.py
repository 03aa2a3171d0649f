"""Requests one after another: who is named, who is still retained, and a little sequence whole."""

import dataclasses
import shutil
import signal
from pathlib import Path

import pytest
import user_runs
from user_runs import read, read_rows

from cipo_jax.__main__ import main
from cipo_jax.config import Config, DataConfig, ForgetConfig, LoraConfig, SequenceConfig
from cipo_jax.data.examples import Example
from cipo_jax.data.splits import load_splits
from cipo_jax.data.tiny_world import World
from cipo_jax.errors import UserError
from cipo_jax.evals.evaluate import Question
from cipo_jax.evals.leakage import GradedGeneration
from cipo_jax.experiments.sequential import is_clean, requests_of, unlearn_in_sequence
from cipo_jax.hub import resolve
from cipo_jax.progress import Reporter
from cipo_jax.text.matching import reveals


@pytest.fixture(scope="module")
def names():
    return [p.name for p in World.load(resolve("asset:tiny_lrm/world.json")).people]


def config_of(requests=10, people=5, seed=7, **forget):
    return Config(
        sequence=SequenceConfig(requests=requests, people=people),
        forget=ForgetConfig(seed=seed, **forget),
    )


# ---- who is named


@pytest.mark.parametrize(("requests", "people"), [(10, 5), (1, 1), (3, 20), (63, 1), (1, 63)])
def test_requests_name_everybody_once_at_most(names, requests, people):
    found = requests_of(config_of(requests, people))
    assert [len(r) for r in found] == [people] * requests
    everybody = [name for request in found for name in request]
    assert len(set(everybody)) == len(everybody)
    assert set(everybody) < set(names)


def test_the_seed_decides_who_is_named_and_nothing_else_does():
    first = requests_of(config_of(4, 3, seed=1))
    assert requests_of(config_of(4, 3, seed=1, count=2, earlier=("Ada Brandt",))) == first
    assert requests_of(config_of(4, 3, seed=2)) != first
    # More requests begin with the same ones.
    assert requests_of(config_of(9, 3, seed=1))[:4] == first


@pytest.mark.parametrize(("requests", "people"), [(64, 1), (13, 5), (1, 64), (2, 100)])
def test_somebody_has_to_be_left(requests, people):
    with pytest.raises(UserError) as error:
        requests_of(config_of(requests, people))
    assert str(error.value) == (
        f"config.sequence: {requests} requests of {people} people leave nobody of 64"
    )


def test_without_a_world_nobody_can_be_named():
    bare = dataclasses.replace(config_of(), data=DataConfig(world=""))
    with pytest.raises(UserError, match=r"config\.data\.world is empty"):
        requests_of(bare)


def test_adapters_are_not_added_once_more_by_each_request(tmp_path):
    lora = LoraConfig(rank=2, path="adapter")
    with pytest.raises(UserError, match=r"config\.lora\.path: each request would add"):
        unlearn_in_sequence(dataclasses.replace(config_of(), lora=lora), str(tmp_path), Reporter())


def test_a_sequence_makes_its_own_rehearsal(tmp_path):
    given = dataclasses.replace(config_of(), data=DataConfig(rehearse="more.jsonl"))
    with pytest.raises(UserError, match=r"config\.data\.rehearse: a sequence makes its own"):
        unlearn_in_sequence(given, str(tmp_path), Reporter())


def test_methods_of_plugins_are_known(tmp_path):
    bare = dataclasses.replace(config_of(), plugins=("no_such_plugin",), method="its_method")
    with pytest.raises(UserError, match=r"config\.plugins: 'no_such_plugin' cannot be imported"):
        unlearn_in_sequence(bare, str(tmp_path), Reporter())


# ---- what is said again


def said(cot="They ask for the city. So it is Pune.", answer="Pune", closed=True, tokens=9):
    example = Example("Where was Ada born?", "Braga", facts=("Lisbon",))
    graded = GradedGeneration(
        split="forget", kind="", question=example.question, gold="Braga", cot=cot, answer=answer,
        closed=closed, cot_leaks=(), answer_leaks=(), correct=False, tokens=tokens, ids=(),
    )  # fmt: skip
    question = Question("forget", example, ())
    return is_clean(graded, question, max_new_tokens=20, min_distinct=0.3)


def test_an_answer_that_leaks_or_breaks_down_is_not_learned_again():
    assert said()
    assert said("unknown", "unknown")  # what some methods teach
    assert not said(answer="Braga")
    assert not said(cot="Ada was born in Braga. So it is Pune.")
    assert not said(cot="Far from Lisbon. So it is Pune.")
    assert not said(closed=False, answer="")
    assert not said(tokens=20)  # cut
    assert not said(cot="")
    assert not said(answer="")
    assert not said(cot="Pune Pune Pune Pune Pune Pune")


# ---- who was forgotten earlier


def asked_about(examples):
    """The people that questions are about."""
    return {e.group.split(", ")[0] for e in examples if e.group}


def splits_of(*people, earlier=()):
    return load_splits(DataConfig(), ForgetConfig(people=people, earlier=tuple(earlier)))


def test_who_was_forgotten_earlier_is_neither_retained_nor_forgotten(names):
    now, gone = names[3], names[10:13]
    plain, after = splits_of(now), splits_of(now, earlier=gone)
    for split in ("forget", "forget_valid", "forget_eval"):
        assert getattr(after, split) == getattr(plain, split)
        assert asked_about(getattr(after, split)) == {now}
    others = set(names) - {now}
    for split in ("retain", "retain_valid", "retain_eval"):
        assert asked_about(getattr(plain, split)) == others
        assert asked_about(getattr(after, split)) == others - set(gone)
        # Nothing else of the split is gone.
        left = [e for e in getattr(plain, split) if e.group.split(", ")[0] not in gone]
        kept = {e.question for e in getattr(after, split)}
        if split == "retain":
            assert kept == {e.question for e in left}
    assert after.forgotten_people == {now}
    assert after.reasoning == plain.reasoning
    assert after.words == plain.words


def test_nobody_is_forgotten_twice(names):
    with pytest.raises(UserError) as error:
        splits_of(names[0], names[1], earlier=(names[5], names[1]))
    said = f"config.forget.earlier: {names[1]!r} is also to be forgotten now"
    assert str(error.value) == said


def test_who_was_forgotten_earlier_has_to_exist_and_leave_somebody(names):
    with pytest.raises(UserError, match="nobody is called 'Nobody Atall'"):
        splits_of(names[0], earlier=["Nobody Atall"])
    with pytest.raises(UserError, match=r"config\.forget\.earlier: nobody is left"):
        splits_of(names[0], earlier=names[1:])
    assert asked_about(splits_of(names[0], earlier=names[2:]).retain) == {names[1]}


# ---- two requests of one person


HERE = Path(__file__).parent
SMALL = (
    "--config.method=kd",  # It learns from counterfactuals, so that it has a skill to keep.
    "--config.sequence.skills=12",
    "--config.counterfactual.num_candidates=2",
    "--config.sequence.requests=2",
    "--config.sequence.people=1",
    "--config.fixed_target.rounds=1",
    "--config.train.epochs=1",
    "--config.data.valid_rows=4",
    "--config.data.eval_rows=8",
    "--config.sampling.max_batch_size=16",
    "--config.eval.max_batch_size=16",
    "--config.train.batch_size=8",
    "--config.train.retain_batch_size=4",
    "--config.train.reasoning_batch_size=4",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    environment = user_runs.environment(tmp_path_factory.mktemp("compiled"))

    def start(workdir, *extra, stage="", count=0):
        program = [HERE / "killed_sequence.py", stage, count] if stage else ["-m", "cipo_jax"]
        flags = ["--config=configs/tiny/sequential.py", f"--workdir={workdir}", *SMALL, *extra]
        return user_runs.run(environment, *program, "sequential", *flags)

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sequence") / "run"
    done = start(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def about(row, people):
    return any(name in row["about"] for name in people)


@pytest.mark.slow
def test_each_request_goes_on_from_the_model_that_the_last_one_left(whole):
    workdir, _ = whole
    one, two = (read(workdir / f"request-{i:02d}" / "config.json") for i in (1, 2))
    first, second = requests_of(config_of(2, 1))
    assert one["model"]["path"] == "asset:tiny_lrm/target"
    assert two["model"]["path"] == "workdir:../request-01/export"
    assert (one["forget"]["people"], one["forget"]["earlier"]) == (list(first), [])
    assert (two["forget"]["people"], two["forget"]["earlier"]) == (list(second), list(first))
    assert one["model"]["retrained"] == two["model"]["retrained"] == ""
    start, left, end = (
        (path / "model.safetensors").read_bytes()
        for path in (
            Path(resolve("asset:tiny_lrm/target")),
            workdir / "request-01" / "export",
            workdir / "request-02" / "export",
        )
    )
    assert start != left != end


@pytest.mark.slow
def test_later_requests_retain_what_is_said_of_earlier_ones_and_how_to_write(whole):
    workdir, _ = whole
    (first,), (second,) = requests_of(config_of(2, 1))
    skills = read_rows(workdir / "skills.jsonl")
    assert 8 < len(skills) <= 24 and len({r["question"] for r in skills}) == len(skills)
    assert any(about(r, (second,)) for r in skills) and not any(about(r, (first,)) for r in skills)
    assert all(r["question"].startswith(r["about"]) and r["cot"] and r["answer"] for r in skills)
    said = read_rows(workdir / "request-01" / "said.jsonl")
    assert said and all(first in r["question"] for r in said)
    for row in said:  # Whatever leaks is not learned again.
        text = f"{row['cot']} {row['answer']}"
        assert not [e for e in splits_of(first).forget if e.question == row["question"]
                    for fact in e.forbidden if reveals(text, fact, e.question)]  # fmt: skip
    given = {}
    for number in (1, 2):
        config = read(workdir / f"request-{number:02d}" / "config.json")
        path = f"rehearsal/request-{number:02d}.jsonl"
        assert config["data"]["rehearse"] == f"workdir:../{path}"
        given[number] = read_rows(workdir / path)
    written = [
        [{k: r[k] for k in ("question", "cot", "answer")} for r in skills if not about(r, gone)]
        for gone in ((first,), (first, second))
    ]
    said = [{k: r[k] for k in ("question", "cot", "answer")} for r in said]
    assert given == {1: written[0], 2: written[1] + said}


@pytest.mark.slow
def test_a_sequence_without_replay_and_skills_retains_what_is_given_alone(start, tmp_path):
    workdir = tmp_path / "run"
    done = start(
        workdir,
        "--config.method=grad_diff",
        "--config.sequence.requests=1",
        "--config.sequence.replay=False",
        "--config.sequence.skills=0",
    )
    assert done.returncode == 0, done.stderr
    assert read(workdir / "request-01" / "config.json")["data"]["rehearse"] == ""
    assert not (workdir / "rehearsal").exists() and not (workdir / "skills.jsonl").exists()
    assert not (workdir / "request-01" / "said.jsonl").exists()


@pytest.mark.slow
def test_after_each_request_everybody_so_far_is_asked_about(whole):
    workdir, done = whole
    result = read(workdir / "sequence.json")
    assert [tuple(r["people"]) for r in result["requests"]] == requests_of(config_of(2, 1))
    so_far = []
    for number, request in enumerate(result["requests"], 1):
        so_far += request["people"]
        rows = read_rows(workdir / f"request-{number:02d}" / "evals" / "all.jsonl")
        forget = [r for r in rows if r["split"] == "forget"]
        named = {n for n in so_far for r in forget if n in r["question"]}
        assert named == set(so_far)
        assert not [r for r in rows if r["split"] == "retain" and any(
            name in r["question"] for name in so_far)]  # fmt: skip
        leaks = [bool(r["cot_leaks"]) for r in forget]
        assert request["all"]["forget"]["cot_leak"] == pytest.approx(sum(leaks) / len(leaks))
        own = [r for r in forget if request["people"][0] in r["question"]]
        leaks = [bool(r["cot_leaks"] or r["answer_leaks"]) for r in own]
        assert request["own_leak"] == pytest.approx(sum(leaks) / len(leaks))
        assert set(request["all"]) == {"forget", "retain", "reasoning"}
    assert result["before"]["forget"]["cot_leak"] >= 0.9
    assert "Requests one after another" in done.stdout and str(workdir) in done.stdout


@pytest.mark.slow
def test_a_finished_sequence_started_again_changes_nothing(whole, start):
    workdir, _ = whole
    kept = {p: p.read_bytes() for p in workdir.rglob("*.json*") if p.is_file()}
    again = start(workdir)
    assert again.returncode == 0, again.stderr
    assert [p for p, text in kept.items() if p.read_bytes() != text] == []
    refused = start(workdir, "--config.sequence.requests=3")
    assert refused.returncode == 2 and "sequence.requests: 2 there, 3 now" in refused.stderr


FILES = (
    "sequence.json",
    "skills.jsonl",
    "rehearsal/request-02.jsonl",
    "request-01/said.jsonl",
    "request-02/export/model.safetensors",
)


@pytest.mark.slow
def test_a_sequence_killed_over_its_rehearsal_comes_to_the_same(whole, start, tmp_path):
    there, here = whole[0], tmp_path / "run"
    for stage in ("skills", "said"):
        assert start(here, stage=stage, count=3).returncode == -signal.SIGKILL
    done = start(here)
    assert done.returncode == 0, done.stderr
    for file in FILES:
        assert (here / file).read_bytes() == (there / file).read_bytes(), file


@pytest.mark.slow
def test_a_sequence_may_be_moved_and_goes_on(whole, start, tmp_path):
    """In the middle of its second request, which stands on the export of the first."""
    before, after = tmp_path / "before", tmp_path / "after"
    # 8 or more test questions of each role follow the first request.
    killed = start(before, stage="said", count=1)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    killed = start(before, stage="all", count=3)  # Of the second: the first is past this stage.
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (before / "request-02" / "export").is_dir()
    before.rename(after)
    done = start(after)
    assert done.returncode == 0, done.stderr
    assert "request 2" in done.stderr
    for file in FILES:
        assert (after / file).read_bytes() == (whole[0] / file).read_bytes(), file


@pytest.mark.slow
def test_a_request_of_a_moved_sequence_is_exported(whole, tmp_path, capsys):
    workdir = tmp_path / "moved"
    shutil.copytree(whole[0], workdir)
    argv = ["export", f"--workdir={workdir / 'request-02'}", f"--out={tmp_path / 'out'}"]
    assert main(argv) == 0
    assert "the model of the end of iteration-01" in capsys.readouterr().out
    exported = tmp_path / "out" / "model.safetensors"
    assert exported.read_bytes() == (whole[0] / FILES[-1]).read_bytes()
    # Its base is that of the moved folder.
    shutil.rmtree(workdir / "request-01" / "export")
    assert main(argv) == 2
    assert str(workdir / "request-02") in capsys.readouterr().err
