"""Progress on the terminal: one bar a stage, with iteration, tokens/s and time left.

Where the output is not a terminal a line is printed when a stage ends, and every half minute.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_S = 30.0


class Bar:
    """The progress of one stage."""

    def __init__(
        self,
        title: str,
        total: int,
        progress: Progress | None = None,
        task: TaskID | None = None,
        quiet: bool = False,
    ):
        self._quiet = quiet
        self.title, self.total = title, total
        self._progress, self._task = progress, task
        self._start = self._printed = time.monotonic()
        self._done, self._tokens, self._first = 0, 0, 0

    def advance(self, count: int = 1, tokens: int = 0, note: str = "") -> None:
        """Counts `count` more items done, and the tokens that they held."""
        self._done += count
        self._tokens += tokens
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._done, rate=self._rate(), note=note)
        elif not self._quiet and time.monotonic() - self._printed > _LINE_EVERY_S:
            self._printed = time.monotonic()
            self._print(note)

    def skip(self, count: int) -> None:
        """Counts items that an earlier process had done."""
        self._first += count
        self.advance(count)

    def close(self) -> None:
        if self._progress is None and not self._quiet:
            self._print("")

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _rate(self) -> str:
        return f"{self._tokens / self._seconds():,.0f} tok/s" if self._tokens else ""

    def _print(self, note: str) -> None:
        done = self._done - self._first
        left = self._seconds() / done * (self.total - self._done) if done else 0.0
        parts = [f"{self.title:<28} {self._done}/{self.total}", f"{self._seconds():.1f} s"]
        parts += [p for p in (self._rate(), note, f"{left:.0f} s left" if left else "") if p]
        print("  ".join(parts), file=sys.stderr, flush=True)


class Reporter:
    """Shows bars and lines to a person, on standard error."""

    def __init__(self, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        self._quiet = quiet

    def line(self, text: str) -> None:
        """Prints one line of plain text; what is in it is never taken for markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A bar for the time of the block."""
        if not self.console.is_terminal or self._quiet:
            bar = Bar(title, total, quiet=self._quiet)
            yield bar
            bar.close()
            return
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>13}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            # Until the first batch is back the time goes into compiling its program.
            task = progress.add_task(title, total=total, rate="", note="compiling")
            yield Bar(title, total, progress, task)
