"""Files are complete or absent, and what killed writers leave is removed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cipo_jax
from cipo_jax.files import atomic_write_text, read_jsonl, remove_stale_temporaries, write_jsonl

GOOD = {"question": "Q?", "answer": "A"}


def _fails(*args, **kwargs):
    raise OSError("disk full")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [GOOD])
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, _fails)
        if broken == "replace":
            patch.setattr(Path, "replace", _fails)
        with pytest.raises(OSError, match="disk full"):
            write_jsonl(path, [{"question": "New?", "answer": "B"}] * 100)
    assert read_jsonl(path) == [GOOD]
    write_jsonl(path, [{"question": "New?", "answer": "B"}])
    assert read_jsonl(path) == [{"question": "New?", "answer": "B"}]


def test_a_row_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [GOOD])
    with pytest.raises(TypeError):
        write_jsonl(path, [GOOD, {"question": {1, 2}}])
    assert read_jsonl(path) == [GOOD]


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    path, events = tmp_path / "note.txt", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(path.exists()), sync(fd)))
    atomic_write_text(path, "hello")
    assert events == [False]
    assert path.read_text() == "hello"
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def _ended_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_temporaries_of_processes_that_ended_are_removed(tmp_path):
    deep, ended = tmp_path / "evals" / "deep", _ended_pid()
    deep.mkdir(parents=True)
    stale = [
        tmp_path / f".stages.json.{ended}.tmp",
        deep / f".rows.jsonl.{ended}.tmp",
        tmp_path / f".export.{ended}.tmp",
        tmp_path / f".huge.{2**70}.tmp",
    ]
    stale[2].mkdir()
    (stale[2] / "model.safetensors").write_text("half")
    kept = [
        tmp_path / f".stages.json.{os.getpid()}.tmp",
        deep / "rows.jsonl",
        tmp_path / f"stages.json.{ended}.tmp",
        tmp_path / f".stages.json.{ended}",
        tmp_path / ".export.tmp",
    ]
    for path in (stale[0], stale[1], stale[3], *kept):
        path.write_text("x")
    assert sorted(remove_stale_temporaries(tmp_path)) == sorted(stale)
    assert not any(path.exists() for path in stale)
    assert all(path.exists() for path in kept)
    assert remove_stale_temporaries(tmp_path) == []
    assert remove_stale_temporaries(tmp_path / "nowhere") == []


def test_a_writer_that_was_killed_leaves_a_temporary_that_is_removed(tmp_path):
    code = (
        "import os, signal; from cipo_jax.files import atomic_write_text; "
        "os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL); "
        f"atomic_write_text({str(tmp_path / 'note.txt')!r}, 'hello')"
    )
    env = os.environ | {"PYTHONPATH": str(Path(cipo_jax.__file__).parent.parent)}
    process = subprocess.run([sys.executable, "-c", code], env=env)
    assert process.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert remove_stale_temporaries(tmp_path) == [left]
    assert list(tmp_path.iterdir()) == []
