"""Atomic writes of text, JSON Lines and folders: a file is complete or absent."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON Lines whole or not at all: to a temporary name, synced, then renamed."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(path, text)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process: another may be writing the same.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
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
