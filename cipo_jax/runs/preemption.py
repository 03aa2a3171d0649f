"""Preemption: SIGTERM and SIGINT ask a run to save its state and stop."""

import signal
from types import FrameType


class Preemption:
    """Whether this process was asked to stop, shared by a run and the runs that belong to it."""

    def __init__(self) -> None:
        self._signals: list[int] = []

    def install_signal_handlers(self) -> None:
        """From now on SIGTERM and SIGINT set `preempted`; a second one ends the process at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            del frame
            self._signals.append(number)
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handle)

    @property
    def preempted(self) -> bool:
        return bool(self._signals)

    @property
    def signal(self) -> int | None:
        """The first signal that was received."""
        return self._signals[0] if self._signals else None
