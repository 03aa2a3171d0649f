"""Locks of run folders: one process works in a folder, or one at a time makes a stage there."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cipo_jax.errors import UserError

# Folders that this process holds until it ends, by resolved path.
_HELD: dict[str, IO[str]] = {}


def acquire(folder: Path) -> None:
    """Takes the folder for this process until it ends.

    Raises:
      UserError: where another process holds it.
    """
    key = str(folder.resolve())
    if key in _HELD:
        return
    file = (folder / ".claim").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"--workdir={folder}: another process is at work there; wait for it, or choose "
            "another folder"
        ) from None
    except OSError:  # A file system without locks.
        pass
    _HELD[key] = file


def try_acquire(path: Path, stack: contextlib.ExitStack) -> bool:
    """Takes a lock file until the stack is closed; False where another process has it.

    Raises:
      OSError: where the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context(path.open("a"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a block of code on this folder; waits for one that is in it."""
    with (folder / ".lock").open("a") as file:
        # Not every file system can lock, and most runs have the folder to themselves.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
