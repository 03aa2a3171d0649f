"""Exceptions that end a command with one line and an exit code, never with a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message names the file, the line or the key, and the way out."""


class Preempted(Exception):
    """The process was asked to stop (SIGTERM or SIGINT) and has saved what it had."""


# Exit codes of the command line. 75 is EX_TEMPFAIL: "run the same command again".
EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
EXIT_PREEMPTED = 75


def exit_code(work: Callable[[], int]) -> int:
    """Does the work; returns its exit code, or prints what stopped it and returns that one's."""
    try:
        return work()
    except UserError as error:
        print(f"cipo: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Preempted as stop:
        print(f"cipo: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED
