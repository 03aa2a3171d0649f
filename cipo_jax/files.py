"""Atomic writes of text, JSON, JSON Lines and folders: a file is complete or absent."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cipo_jax.typing import Json

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")


def atomic_write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically: to a temporary name, synced, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the process id: another process may write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def remove_stale_temporaries(folder: str | Path) -> list[Path]:
    """Removes `.NAME.PID.tmp` files and folders, at any depth, of processes that have ended.

    Process ids are those of this machine: call it only while no other machine writes there.

    Returns:
      The removed paths.
    """
    removed = []
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            match = _TEMPORARY.fullmatch(name)
            if match is None or _is_running(int(match[1])):
                continue
            path = Path(parent, name)
            if name in folders:
                folders.remove(name)
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # A process of another user.
        return True
    return True


def to_json(value: object) -> str:
    """Indented JSON with one newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes JSON Lines atomically."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(path, text)


def read_jsonl(path: str | Path) -> list[dict[str, Json]]:
    """Reads what `write_jsonl` wrote."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@contextlib.contextmanager
def atomic_directory(folder: str | Path) -> Iterator[Path | None]:
    """A temporary folder, renamed to `folder` when the block ends and removed when it fails.

    An existing `folder` is replaced. On several processes all must enter the block; processes other
    than the first get None and write nothing, and none leaves before the folder is written.
    """
    import jax

    if jax.process_index():
        yield None
        _wait_for_all(folder)
        return
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _wait_for_all(folder)


def _wait_for_all(folder: str | Path) -> None:
    """Blocks until every process has come here, so that all of them find the folder."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"wrote {folder}")


def _replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; an existing folder is moved aside first, and back on failure."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
