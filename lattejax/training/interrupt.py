"""Stopping between two steps when asked to, so that nothing is lost."""

import signal
import sys


class Interrupted(Exception):
    """Training was asked to stop, and has saved; `signum` is the signal that asked."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command to go on")
        self.signum = signum


class InterruptGuard:
    """While it is entered, the first SIGINT or SIGTERM only sets `signum`; a second one acts as it always does."""

    def __init__(self):
        self.signum: int | None = None
        self._previous = {}

    def __enter__(self) -> "InterruptGuard":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: object) -> None:
        self.signum = signum
        self.__exit__()
        print("stopping after this step, to save; once more to stop at once", file=sys.stderr, flush=True)
