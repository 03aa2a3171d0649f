import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest
from cipo_jax.unlearning import run_folder
from cipo_jax.unlearning.run_folder import MetricsLog, RunFolder

from cipo_jax.config import CipoConfig, Config, TrainConfig
from cipo_jax.errors import Preempted, UserError
from cipo_jax.files import read_jsonl


@pytest.fixture
def open_folder(tmp_path):
    def open_(config=None, fingerprint="model"):
        return RunFolder(tmp_path / "run", config or Config(), fingerprint)

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
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


class _Stage:
    """A stage that counts how often it is made."""

    def __init__(self, folder, output=None):
        self.folder, self.output, self.made = folder, output, 0

    def __call__(self):
        self.made += 1
        if self.output:
            self.folder.write_json(self.output, self.made)
        return {"made": self.made}


def test_a_folder_belongs_to_one_process(open_folder, monkeypatch):
    folder = open_folder()
    folder.claim()
    open_folder().claim()  # Of this very process.
    # As another process, which has no claims yet, sees it.
    monkeypatch.setattr(run_folder, "_CLAIMS", {})
    with pytest.raises(UserError, match="another process is at work there; wait for it, or choose"):
        folder.claim()


def test_a_stage_that_another_process_made_meanwhile_is_taken_over(open_folder):
    late, early = open_folder(), open_folder()
    stage = _Stage(early, "out.json")
    assert early.once("a", stage, ["out.json"]) == {"made": 1}
    assert late.once("a", stage, ["out.json"]) == {"made": 1}
    assert stage.made == 1
    # What each enters is kept with what the other did.
    late.once("b", _Stage(late))
    early.once("b", _Stage(early))
    assert open_folder().stages.keys() == {"a", "b"}


def test_who_wants_a_stage_waits_for_who_makes_it(open_folder):
    """Two threads, since a lock is of an open file, not of a process."""
    first, second, order = open_folder(), open_folder(), []
    making, may_end = threading.Event(), threading.Event()

    def slow():
        making.set()
        may_end.wait(10)
        order.append("made")
        return {"made": 1}

    def other():
        assert second.once("a", _Stage(second)) == {"made": 1}
        order.append("taken")

    one = threading.Thread(target=first.once, args=("a", slow))
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


def test_a_stage_happens_once(open_folder):
    folder = open_folder()
    stage = _Stage(folder, "out.json")
    assert folder.once("a", stage, ["out.json"]) == {"made": 1}
    again = open_folder()
    assert again.once("a", stage, ["out.json"]) == {"made": 1}
    assert stage.made == 1
    assert again.result("a") == {"made": 1}
    assert again.read_json("out.json") == 1


def test_a_stage_without_a_result_is_remembered(open_folder):
    open_folder().once("a", lambda: None)
    assert open_folder().once("a", lambda: pytest.fail("made again")) == {}


def test_a_stage_happens_again_where_its_output_has_vanished(open_folder):
    folder = open_folder()
    stage = _Stage(folder, "out.json")
    folder.once("a", stage, ["out.json"])
    (folder.path / "out.json").unlink()
    assert open_folder().once("a", stage, ["out.json"]) == {"made": 2}
    assert open_folder().once("a", stage, ["out.json"]) == {"made": 2}


def test_a_stage_that_fails_has_not_happened(open_folder):
    def fail():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        open_folder().once("a", fail)
    assert open_folder().once("a", lambda: {"made": 7}) == {"made": 7}


def test_a_stage_made_from_another_model_is_refused(open_folder):
    open_folder().once("a", dict)
    with pytest.raises(UserError, match="stage a was made from other inputs") as caught:
        open_folder(fingerprint="other").once("a", lambda: pytest.fail("made"))
    assert "stages.json" in str(caught.value)
    assert "--workdir" in str(caught.value)


def test_a_stage_after_other_stages_than_before_is_refused(open_folder):
    folder = open_folder()
    folder.once("a", dict)
    folder.once("b", dict)
    with pytest.raises(UserError, match="stage b was made from other inputs"):
        open_folder().once("b", dict)


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
        epochs=2.0, batch=8, retain_batch=8, lr=1.0, warmup_steps=0, b1=0.5, b2=0.5
    )
    with pytest.raises(UserError, match=r"and 2 more\)"):
        open_folder(Config(train=changed))


def test_a_setting_that_an_old_folder_does_not_know_is_told(open_folder):
    folder = open_folder()
    config = folder.read_json("config.json")
    del config["train"]["clip"]
    folder.write_json("config.json", config)
    with pytest.raises(UserError, match=r"train\.clip: None there, 1\.0 now"):
        open_folder()


def test_a_config_that_is_not_json_is_an_error(open_folder):
    folder = open_folder()
    (folder.path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        open_folder()


def test_a_file_in_place_of_the_folder_is_an_error(open_folder, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        open_folder()


def _rows(batch):
    return [{"batch": batch, "text": f"r\u2028{i}"} for i in range(2)]


def _each(work):
    return lambda missing: ((item, work(item)) for item in missing)


def _in_parts(folder, work, on_part=lambda rows, cached: None):
    def make():
        rows = folder.in_parts("a", 4, _each(work), on_part)
        folder.write_rows("a.jsonl", rows)
        return {"n": len(rows)}

    return folder.once("a", make, ["a.jsonl"])


def test_parts_that_are_there_are_not_made_again(open_folder):
    expected = [row for batch in range(4) for row in _rows(batch)]
    worked, seen = [], []

    def fails_at_2(batch):
        if batch == 2:
            raise RuntimeError("power cut")
        worked.append(batch)
        return _rows(batch)

    with pytest.raises(RuntimeError, match="power cut"):
        _in_parts(open_folder(), fails_at_2)
    assert worked == [0, 1]

    def works(batch):
        worked.append(batch)
        return _rows(batch)

    folder = open_folder()
    result = _in_parts(folder, works, lambda rows, cached: seen.append((len(rows), cached)))
    assert result == {"n": 8}
    assert worked == [0, 1, 2, 3]
    assert seen == [(2, True), (2, True), (2, False), (2, False)]
    assert folder.read_rows("a.jsonl") == expected


def test_parts_are_gone_once_their_stage_is_entered(open_folder):
    folder = open_folder()
    _in_parts(folder, _rows)
    assert not list((folder.path / ".parts").rglob("*.jsonl"))
    assert read_jsonl(folder.path / "a.jsonl") == [r for b in range(4) for r in _rows(b)]


def test_a_batch_without_rows_is_remembered_too(open_folder):
    folder = open_folder()
    folder.in_parts("a", 1, _each(lambda item: []))
    assert folder.in_parts("a", 1, lambda missing: pytest.fail("made again")) == []


def test_items_may_come_in_any_order_and_a_torn_line_is_made_again(open_folder):
    folder = open_folder()

    def work(missing):
        for item in (2, 0):
            yield item, _rows(item)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        folder.in_parts("a", 4, work)
    (path,) = (folder.path / ".parts").rglob("*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"item": 1, "rows": [{"ba')
    asked = []

    def rest(missing):
        asked.extend(missing)
        return _each(_rows)(reversed(missing))

    expected = [row for item in range(4) for row in _rows(item)]
    assert folder.in_parts("a", 4, rest) == expected
    assert asked == [1, 3]
    assert path.read_bytes().startswith(whole)
    assert folder.in_parts("a", 4, lambda missing: pytest.fail("made again")) == expected


def test_parts_made_from_another_model_are_not_used(open_folder):
    def fails_at_1(batch):
        if batch == 1:
            raise RuntimeError("power cut")
        return [{"from": "old model"}]

    with pytest.raises(RuntimeError, match="power cut"):
        _in_parts(open_folder(), fails_at_1)
    other = open_folder(fingerprint="other")
    try:
        _in_parts(other, lambda batch: [{"from": "new model"}])
    except UserError:
        return
    assert other.read_rows("a.jsonl") == [{"from": "new model"}] * 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_run_to_stop(open_folder, signals, number):
    folder = open_folder()
    folder.listen()
    folder.stop_if_asked()
    assert not folder.stop_asked
    os.kill(os.getpid(), number)
    assert folder.stop_asked
    with pytest.raises(Preempted, match="run the same command again") as caught:
        folder.stop_if_asked()
    assert str(folder.path) in str(caught.value)
    # The second one would end the process.
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_within_a_stage_stops_after_the_batch_that_is_saved(open_folder, signals):
    worked = []

    def work(batch):
        worked.append(batch)
        if batch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return _rows(batch)

    folder = open_folder()
    folder.listen()
    with pytest.raises(Preempted, match="in stage a;"):
        _in_parts(folder, work)
    assert worked == [0, 1]
    _in_parts(open_folder(), work)
    assert worked == [0, 1, 2, 3]


def test_seconds_of_a_stage_add_up_over_two_processes(open_folder, clock):
    def work(batch):
        clock.seconds += 10.0
        if batch == 2 and clock.seconds < 500:
            clock.seconds += 3.0
            raise RuntimeError("power cut")
        return _rows(batch)

    with pytest.raises(RuntimeError, match="power cut"):
        _in_parts(open_folder(), work)
    clock.seconds = 1000.0
    folder = open_folder()
    assert folder.seconds() == {}
    _in_parts(folder, work)
    # What the first process spent on a batch that it never saved is not counted.
    assert folder.seconds() == {"a": pytest.approx(40.0)}
    assert open_folder().seconds() == {"a": pytest.approx(40.0)}


def test_seconds_go_to_the_stage_they_were_spent_in(open_folder, clock):
    def spend(seconds):
        clock.seconds += seconds

    folder = open_folder()
    folder.count_startup(2.5)
    spend(7)
    folder.once("a", lambda: spend(1))
    spend(50)
    folder.once("b", lambda: spend(4))
    assert folder.seconds() == pytest.approx({"startup": 2.5, "a": 1.0, "b": 4.0})
    again = open_folder()
    again.count_startup(1.5)
    assert again.seconds() == pytest.approx({"startup": 4.0, "a": 1.0, "b": 4.0})


def test_rows_and_json_come_back(open_folder):
    folder = open_folder()
    folder.write_rows("deep/rows.jsonl", [{"a": "é\u2028"}, {"b": None}])
    assert folder.read_rows("deep/rows.jsonl") == [{"a": "é\u2028"}, {"b": None}]
    folder.write_json("deep/value.json", {"a": [1, "é"]})
    assert folder.read_json("deep/value.json") == {"a": [1, "é"]}
    assert "é" in (folder.path / "deep/value.json").read_text(encoding="utf-8")


def _steps(folder):
    return [row["step"] for row in read_jsonl(folder.path / "metrics.jsonl")]


def test_the_log_holds_every_step_once(open_folder):
    folder = open_folder()
    log = MetricsLog(folder)
    log.rewind(0)
    for step in range(1, 6):
        log.write(step, "warmup", {"loss": 1.0 / step})
    log.close()
    again = MetricsLog(folder)
    again.rewind(3)
    assert _steps(folder) == [1, 2, 3]
    again.write(4, "iteration-01", {"loss": 9.0})
    again.close()
    assert read_jsonl(folder.path / "metrics.jsonl")[-1] == {
        "step": 4, "phase": "iteration-01", "loss": 9.0,
    }  # fmt: skip
    assert list((folder.path / "tensorboard").iterdir())


def test_a_half_written_line_of_the_log_is_dropped(open_folder):
    folder = open_folder()
    log = MetricsLog(folder)
    log.rewind(0)
    log.write(1, "warmup", {"loss": 1.0})
    log.write(2, "warmup", {"loss": 2.0})
    log.close()
    path = folder.path / "metrics.jsonl"
    half = json.dumps({"step": 3, "phase": "warmup", "loss": 3.0})[:20]
    path.write_text(path.read_text() + half)
    log = MetricsLog(folder)
    log.rewind(5)
    log.write(3, "warmup", {"loss": 3.0})
    log.close()
    assert _steps(folder) == [1, 2, 3]


def test_rewinding_to_the_start_empties_the_log(open_folder):
    folder = open_folder()
    log = MetricsLog(folder)
    log.rewind(0)
    log.write(1, "warmup", {"loss": 1.0})
    log.rewind(0)
    log.close()
    assert _steps(folder) == []
