"""A stage happens once in a run folder, and is known by its function and its inputs."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_run import Counter, Made, Text, Texts, fails, never, open_run

from cipo_jax.config import CipoConfig, Config, TrainConfig
from cipo_jax.errors import Preempted, UserError
from cipo_jax.files import read_jsonl
from cipo_jax.runs import ledger as ledger_module
from cipo_jax.runs import locks
from cipo_jax.runs.context import Run
from cipo_jax.runs.identity import stage_version
from cipo_jax.runs.ledger import Ledger, StageIdentity


@pytest.fixture
def open_folder(tmp_path):
    def open_(config=None, **how):
        return open_run(tmp_path / "run", config, **how)

    return open_


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(ledger_module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def _refusal(call):
    """The one-line message with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- once


def test_a_stage_happens_once(open_folder):
    run, counter = open_folder(), Counter()
    assert run.stage("a", counter.with_file, "model") == Texts(1, (Text(0, "model"),))
    again = open_folder()
    assert again.stage("a", counter.with_file, "model") == Texts(1, (Text(0, "model"),))
    assert counter.made == 1
    assert again.ledger.result("a") == {"schema": "texts/1", "made": 1}
    assert read_jsonl(again.path("a.jsonl")) == [{"schema": "text/1", "item": 0, "text": "model"}]


def test_a_stage_that_is_asked_for_again_is_not_read_again(open_folder):
    run = open_folder()
    made = run.stage("a", Counter().with_file, "model")
    run.path("a.jsonl").unlink()
    assert run.stage("a", Counter().with_file, "model") is made


def test_a_stage_happens_again_where_its_output_has_vanished(open_folder):
    run, counter = open_folder(), Counter()
    run.stage("a", counter.with_file, "model")
    run.path("a.jsonl").unlink()
    assert open_folder().stage("a", counter.with_file, "model").made == 2
    assert open_folder().stage("a", counter.with_file, "model").made == 2


def test_a_stage_that_fails_has_not_happened(open_folder):
    def make(run: Run, source: str) -> Made:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        open_folder().stage("a", make, "model")
    assert "a" not in open_folder().ledger
    assert open_folder().stage("a", Counter().plain, "model") == Made(1)


def test_stages_of_a_place_stand_under_its_name(open_folder):
    run, counter = open_folder(), Counter()
    at = run.at("iterations").at("01")
    at.stage("rollouts", counter.with_file, "model")
    assert run.ledger.names() == ["iterations/01/rollouts"]
    assert (run.folder / "iterations/01/rollouts.jsonl").is_file()
    run.at("iterations/02").stage("rollouts", counter.with_file, "model")
    assert counter.made == 2


def test_a_stage_function_must_say_what_it_returns_and_take_what_it_is_given(open_folder):
    def untold(run, source):
        raise AssertionError

    with pytest.raises(TypeError, match="untold must be annotated to return a StageResult"):
        open_folder().stage("a", untold, "model")
    with pytest.raises(TypeError, match=r"make takes the inputs \['source'\], and was given 2"):
        open_folder().stage("a", Counter().plain, "model", "data")


# ---- by whom


def test_a_folder_belongs_to_one_process(open_folder, monkeypatch):
    run = open_folder()
    open_folder()  # Of this very process.
    # As another process, which holds no folders yet, sees it.
    monkeypatch.setattr(locks, "_HELD", {})
    match = "another process is at work there; wait for it, or choose"
    with pytest.raises(UserError, match=match):
        locks.acquire(run.folder)
    with pytest.raises(UserError, match=match):
        open_folder()
    open_folder(claim=False)


def test_a_stage_that_another_process_made_meanwhile_is_taken_over(open_folder):
    late, early = open_folder(), open_folder()
    counter = Counter()
    assert early.stage("a", counter.with_file, "model").made == 1
    assert late.stage("a", counter.with_file, "model").made == 1
    assert counter.made == 1
    # What each enters is kept with what the other did.
    late.stage("b", Counter().plain, "model")
    early.stage("c", Counter().plain, "model")
    assert set(open_folder().ledger.names()) == {"a", "b", "c"}


def test_a_stage_of_another_process_is_read_from_its_files(open_folder):
    """By a process that had opened the folder before."""
    run = open_folder()
    script = "\n".join(
        [
            "import sys",
            "from small_run import Counter, open_run",
            "run = open_run(sys.argv[1], claim=False)",
            "run.stage('a', Counter().with_file, 'model')",
        ]
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script, str(run.folder)], env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0
    assert "a" not in run.ledger
    counter = Counter()
    assert run.stage("a", counter.with_file, "model") == Texts(1, (Text(0, "model"),))
    assert counter.made == 0


def test_a_stage_begun_by_a_process_that_another_one_finished_is_done(open_folder):
    with pytest.raises(RuntimeError):
        open_folder().stage("a", fails, "model")
    late, early = open_folder(), open_folder()
    early.stage("a", Counter().plain, "model")
    late.stage("b", Counter().plain, "model")
    saved = json.loads((late.folder / "stages.json").read_text())
    assert set(saved["stages"]) == {"a", "b"}
    assert saved["unfinished"] == {}


def test_a_stage_that_failed_here_may_be_ended_by_another_process(open_folder):
    late, early = open_folder(), open_folder()
    with pytest.raises(RuntimeError):
        late.stage("a", fails, "model")
    assert late.ledger.stage == "a"
    early.stage("a", Counter().plain, "model")
    assert late.stage("a", never, "model") == Made(1)
    late.ledger.save()  # No stage is under way whose clock goes on.
    assert late.ledger.stage == ""
    assert open_folder().stage("a", never, "model") == Made(1)


def test_who_wants_a_stage_waits_for_who_makes_it(open_folder):
    """Two threads, since a lock is of an open file, not of a process."""
    first, second, order = open_folder(), open_folder(), []
    making, may_end = threading.Event(), threading.Event()

    def make(run: Run, source: str) -> Made:
        making.set()
        may_end.wait(10)
        order.append("made")
        return Made(1)

    def other():
        assert second.stage("a", Counter().plain, "model") == Made(1)
        order.append("taken")

    one = threading.Thread(target=first.stage, args=("a", make, "model"))
    one.start()
    making.wait(10)
    two = threading.Thread(target=other)
    two.start()
    two.join(0.3)
    assert two.is_alive() and order == []
    may_end.set()
    one.join(10)
    two.join(10)
    assert order == ["made", "taken"]


def test_two_runs_of_a_process_that_share_a_stage_make_it_once(open_folder, tmp_path):
    owner, counter = open_folder(), Counter()
    runs = [open_run(tmp_path / name, parent=owner) for name in ("one", "two")]
    shared = [run.shared(lambda name: owner if name == "a" else None) for run in runs]
    results = [run.stage("a", counter.with_file, "model") for run in shared]
    assert counter.made == 1
    assert results[0] is results[1]
    assert list(shared[0].state.used) == ["a"]
    for run in shared:
        run.stage("b", counter.plain, "model")
    assert counter.made == 3
    assert owner.ledger.names() == ["a"]
    assert runs[0].ledger.names() == runs[1].ledger.names() == ["b"]


# ---- from what


def test_a_stage_made_from_another_input_is_refused_with_its_name(open_folder):
    open_folder().stage("a", Counter().plain, "model")
    message = _refusal(lambda: open_folder().stage("a", never, "other"))
    assert "stages.json: stage a was made from other inputs (changed: source)" in message
    assert "--workdir" in message
    assert open_folder().stage("a", never, "model") == Made(1)


def test_only_inputs_that_changed_are_named(open_folder):
    def combine(run: Run, first: str, second: int, third: Made) -> Made:
        return Made(1)

    open_folder().stage("a", combine, "x", 1, Made(1))
    assert "(changed: second)" in _refusal(
        lambda: open_folder().stage("a", combine, "x", 2, Made(1))
    )
    message = _refusal(lambda: open_folder().stage("a", combine, "y", 1, Made(2)))
    assert "(changed: first, third)" in message


def test_a_stage_that_was_begun_from_another_input_is_refused_with_its_name(open_folder):
    with pytest.raises(RuntimeError, match="power cut"):
        open_folder().stage("a", fails, "model")
    message = _refusal(lambda: open_folder().stage("a", never, "other"))
    assert "stage a was made from other inputs (changed: source)" in message
    assert open_folder().stage("a", Counter().plain, "model") == Made(1)


def test_a_ledger_refuses_to_begin_what_was_begun_from_other_inputs(tmp_path):
    begun = StageIdentity("make@1", {"weights": "aa", "data": "bb"})
    Ledger(tmp_path).begin("a", begun)
    Ledger(tmp_path).begin("a", begun)
    other = StageIdentity("make@1", {"weights": "aa", "data": "cc"})
    message = _refusal(lambda: Ledger(tmp_path).begin("a", other))
    assert "stage a was made from other inputs (changed: data)" in message
    newer = StageIdentity("make@2", begun.inputs)
    message = _refusal(lambda: Ledger(tmp_path).begin("a", newer))
    assert "(function make@1 there, make@2 now)" in message


@pytest.mark.parametrize("ended", [True, False])
def test_a_raised_version_of_the_function_is_refused(open_folder, ended):
    if ended:
        open_folder().stage("a", Counter().plain, "model")
    else:
        with pytest.raises(RuntimeError):
            open_folder().stage("a", fails, "model")
    raised = stage_version(2)(Counter().plain)
    message = _refusal(lambda: open_folder().stage("a", raised, "model"))
    assert "stage a was made from other inputs (function make@1 there, make@2 now)" in message


def test_a_stage_made_by_another_function_is_refused(open_folder):
    open_folder().stage("a", Counter().plain, "model")
    message = _refusal(lambda: open_folder().stage("a", Counter().with_file, "model"))
    assert "(function make@1 there, make_texts@1 now)" in message


def test_stages_called_in_another_order_are_found_again(open_folder):
    counter = Counter()
    run = open_folder()
    for name in ("a", "b", "c"):
        run.stage(name, counter.with_file, name)
    assert counter.made == 3
    again = open_folder()
    found = [again.stage(name, counter.with_file, name) for name in ("c", "a", "b")]
    assert [result.made for result in found] == [3, 1, 2]
    assert counter.made == 3


def test_stages_with_others_between_are_found_again(open_folder):
    first, more = Counter(), Counter()
    run = open_folder()
    one = run.stage("a", first.plain, "model")
    run.stage("c", first.of_two, one, one)
    again = open_folder()
    new = again.stage("new", more.plain, "model")
    one = again.stage("a", first.plain, "model")
    again.stage("b", more.of_two, new, one)
    assert again.stage("c", first.of_two, one, one) == Made(2)
    assert (first.made, more.made) == (2, 2)


def test_a_stage_is_asked_for_without_those_before_it(open_folder):
    counter = Counter()
    run = open_folder()
    run.stage("a", counter.plain, "model")
    run.stage("b", counter.plain, "model")
    assert open_folder().stage("b", counter.plain, "model") == Made(2)
    assert counter.made == 2


def test_a_result_is_the_same_input_whether_it_was_made_or_read(open_folder):
    counter = Counter()
    run = open_folder()
    made = run.stage("a", counter.plain, "model")
    run.stage("b", counter.of_two, made, made)
    again = open_folder()
    read = again.stage("a", counter.plain, "model")
    assert again.stage("b", counter.of_two, read, read) == Made(2)
    message = _refusal(lambda: again.stage("b", counter.of_two, Made(7), read))
    assert "(changed: first)" in message


# ---- config and layout of the folder


def test_another_config_in_an_old_folder_is_refused_with_its_keys(open_folder):
    open_folder()
    changed = Config(seed=5, train=TrainConfig(lr=0.5), cipo=CipoConfig(loss="ipo"))
    with pytest.raises(UserError) as caught:
        open_folder(changed)
    message = str(caught.value)
    assert "config.json" in message
    assert "seed: 0 there, 5 now" in message
    assert "train.lr: 1e-05 there, 0.5 now" in message
    assert "cipo.loss: 'dpo' there, 'ipo' now" in message
    assert "train.batch" not in message
    assert "--workdir" in message
    open_folder()


def test_many_changed_keys_are_counted(open_folder):
    open_folder()
    changed = TrainConfig(
        epochs=2.0, batch_size=8, retain_batch_size=8, lr=1.0, warmup_steps=0, b1=0.5, b2=0.5
    )
    with pytest.raises(UserError, match=r"and 2 more\)"):
        open_folder(Config(train=changed))


def test_a_setting_that_an_old_folder_does_not_know_is_told(open_folder):
    path = open_folder().path("config.json")
    config = json.loads(path.read_text())
    del config["train"]["max_grad_norm"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"train\.max_grad_norm: None there, 1\.0 now"):
        open_folder()


def test_a_config_that_is_not_json_is_an_error(open_folder):
    run = open_folder()
    run.path("config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        open_folder()


def test_stages_that_are_not_json_are_an_error(open_folder):
    run = open_folder()
    for text in ("{", "[]"):
        run.path("stages.json").write_text(text)
        assert "stages.json: not JSON" in _refusal(open_folder)


def test_a_file_in_place_of_the_folder_is_an_error(open_folder, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        open_folder()


def test_stages_of_the_old_layout_are_refused(open_folder, tmp_path):
    old = {
        "stages": {"before": {"fingerprint": "0123456789abcdef", "seconds": 1.5, "result": {}}},
        "unfinished_seconds": {},
    }
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "stages.json"
    path.write_text(json.dumps(old))
    message = _refusal(open_folder)
    assert message.startswith(f"{path}: ")
    assert "layout of another version of cipo_jax (layout 1, here 2)" in message
    assert "choose another --workdir" in message
    assert json.loads(path.read_text()) == old
    path.write_text(json.dumps(old | {"layout": 3}))
    assert "(layout 3, here 2)" in _refusal(open_folder)


def test_a_config_of_the_old_layout_is_refused(open_folder, tmp_path):
    """Of a run that was killed before its first stage."""
    old = {"seed": 0, "method": "cipo", "baseline": {"rounds": 2, "span": "both"}}
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(old))
    message = _refusal(open_folder)
    assert message.startswith(f"{path}: ")
    assert "layout of another version of cipo_jax" in message
    assert "choose another --workdir" in message
    assert json.loads(path.read_text()) == old


def test_remains_of_killed_processes_are_removed_at_the_next_start(open_folder):
    run = open_folder()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = [
        run.path(f".stages.json.{ended.pid}.tmp"),
        run.path(f"evals/.before.jsonl.{ended.pid}.tmp"),
        run.path(f"iterations/01/.pairs.jsonl.{ended.pid}.tmp"),
    ]
    running = run.path(f".stages.json.{os.getppid()}.tmp")
    for path in (*stale, running):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    open_folder(claim=False)  # Others may be at work there.
    assert all(path.exists() for path in stale)
    open_folder()
    assert not any(path.exists() for path in stale)
    assert running.exists()


# ---- items


def _texts(item):
    return tuple(Text(10 * item + i, f"r\u2028{i}") for i in range(2))


def _each(work):
    return lambda missing: ((item, work(item)) for item in missing)


def _ignored(rows, cached):
    pass


def _mapped(run, work, on_item=_ignored, source="model"):
    """A stage of four items."""

    def make(run: Run, source: str) -> Texts:
        found = run.resumable_map("items", Text, 4, _each(work), on_item)
        return Texts(len(found), tuple(row for rows in found for row in rows))

    return run.stage("a", make, source)


EXPECTED = tuple(row for item in range(4) for row in _texts(item))


def test_items_that_are_there_are_not_made_again(open_folder):
    worked, seen = [], []

    def fails_at_2(item):
        if item == 2:
            raise RuntimeError("power cut")
        worked.append(item)
        return _texts(item)

    with pytest.raises(RuntimeError, match="power cut"):
        _mapped(open_folder(), fails_at_2)
    assert worked == [0, 1]

    def works(item):
        worked.append(item)
        return _texts(item)

    run = open_folder()
    result = _mapped(run, works, lambda rows, cached: seen.append((len(rows), cached)))
    assert result == Texts(4, EXPECTED)
    assert worked == [0, 1, 2, 3]
    assert seen == [(2, True), (2, True), (2, False), (2, False)]
    assert Texts.load(run.path("a"), run.ledger.result("a")) == result


def test_items_are_gone_once_their_stage_is_entered(open_folder):
    run = open_folder()
    _mapped(run, _texts)
    assert not (run.folder / ".parts").exists()
    assert read_jsonl(run.path("a.jsonl")) == [row.to_row() for row in EXPECTED]


def test_several_loops_of_a_stage_are_kept_apart(open_folder):
    made = []

    def stage_of_two_loops(cut):
        def make(run: Run, source: str) -> Texts:
            def work(name, missing):
                for i in missing:
                    if (name, i) == cut:
                        raise RuntimeError("power cut")
                    made.append((name, i))
                    yield i, (Text(i, name),)

            found = []
            for name in ("one", "two"):
                loop = functools.partial(work, name)
                found += run.resumable_map(name, Text, 2, loop, _ignored)
            return Texts(0, tuple(row for (row,) in found))

        return make

    with pytest.raises(RuntimeError, match="power cut"):
        open_folder().stage("a", stage_of_two_loops(("two", 1)), "model")
    assert made == [("one", 0), ("one", 1), ("two", 0)]
    result = open_folder().stage("a", stage_of_two_loops(None), "model")
    assert made == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert [(row.text, row.item) for row in result.texts] == made


def test_items_made_from_another_model_are_not_used(open_folder):
    def fails_at_1(item):
        if item == 1:
            raise RuntimeError("power cut")
        return (Text(0, "old model"),)

    with pytest.raises(RuntimeError, match="power cut"):
        _mapped(open_folder(), fails_at_1)
    message = _refusal(lambda: _mapped(open_folder(), _texts, source="other"))
    assert "stage a was made from other inputs (changed: source)" in message


# ---- preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_run_to_stop(open_folder, signals, number):
    run = open_folder()
    run.preemption.install_signal_handlers()
    run.stop_if_preempted()
    assert not run.preemption.preempted
    os.kill(os.getpid(), number)
    assert run.preemption.preempted
    assert run.preemption.signal == number
    with pytest.raises(Preempted, match="run the same command again") as caught:
        run.stop_if_preempted()
    assert str(run.folder) in str(caught.value)
    # The second one would end the process.
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_within_a_stage_stops_after_the_item_that_is_saved(open_folder, signals):
    worked = []

    def work(item):
        worked.append(item)
        if item == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return _texts(item)

    run = open_folder()
    run.preemption.install_signal_handlers()
    with pytest.raises(Preempted, match="in stage a;"):
        _mapped(run, work)
    assert worked == [0, 1]
    assert _mapped(open_folder(), work).texts == EXPECTED
    assert worked == [0, 1, 2, 3]


def test_a_run_that_belongs_to_another_stops_with_it(open_folder, signals, tmp_path):
    parent = open_folder()
    parent.preemption.install_signal_handlers()
    child = open_run(tmp_path / "child", parent=parent)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted):
        child.stop_if_preempted()


# ---- the clock


def test_seconds_of_a_stage_add_up_over_two_processes(open_folder, clock):
    def work(item):
        clock.seconds += 10.0
        if item == 2 and clock.seconds < 500:
            clock.seconds += 3.0
            raise RuntimeError("power cut")
        return _texts(item)

    with pytest.raises(RuntimeError, match="power cut"):
        _mapped(open_folder(), work)
    clock.seconds = 1000.0
    run = open_folder()
    assert run.ledger.seconds() == {}
    _mapped(run, work)
    # What the first process spent on an item that it never saved is not counted.
    assert run.ledger.seconds() == {"a": pytest.approx(40.0)}
    assert open_folder().ledger.seconds() == {"a": pytest.approx(40.0)}


def test_seconds_go_to_the_stage_they_were_spent_in(open_folder, clock):
    def spend(run: Run, seconds: float) -> Made:
        clock.seconds += seconds
        return Made(1)

    run = open_folder()
    run.ledger.count_startup(2.5)
    clock.seconds += 7
    run.stage("a", spend, 1.0)
    clock.seconds += 50
    run.stage("b", spend, 4.0)
    assert run.ledger.seconds() == pytest.approx({"startup": 2.5, "a": 1.0, "b": 4.0})
    again = open_folder()
    again.ledger.count_startup(1.5)
    assert again.ledger.seconds() == pytest.approx({"startup": 4.0, "a": 1.0, "b": 4.0})


def test_the_clock_alone_is_not_saved_for_every_item(open_folder, clock, monkeypatch):
    """A synced file would take longer than a short completion."""
    written = []
    write = Ledger._write
    monkeypatch.setattr(Ledger, "_write", lambda self: written.append(1) or write(self))

    def work(item):
        clock.seconds += 0.4
        return _texts(item)

    _mapped(open_folder(), work)
    assert len(written) == 3  # Begun; after 1.2 s; entered.


def test_json_comes_back(open_folder):
    run = open_folder()
    run.at("deep").write_json("value.json", {"a": [1, "\u00e9"]})
    text = (run.folder / "deep/value.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [1, "\u00e9"]}
    assert "\u00e9" in text
