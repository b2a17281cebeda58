"""Stopping a command on SIGINT (Ctrl-C) or SIGTERM: one line, and an exit code that tells which.

Training has its own guard, which saves first (`training.interrupt`).
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

TRY_AGAIN = 75  # EX_TEMPFAIL: the same command resumes; launchers run it again
SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 3.0


class Interrupted(Exception):
    """A command has stopped on request; `signum` is the signal that requested it."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command to resume")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """75 for a preemption (SIGTERM); otherwise the shell convention, 128 + signum."""
        return TRY_AGAIN if self.signum == signal.SIGTERM else 128 + self.signum

    def end_process(self) -> None:
        """Ends the process at once, from any thread."""
        print(self, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(self.exit_code)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within it, the first SIGINT or SIGTERM raises `Interrupted` in the main thread.

    Python runs signal handlers only between its own instructions, so not while XLA compiles. Therefore a thread watches
    too: it ends the process if the main thread does not react in `GRACE_SECONDS`.
    """
    ended = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def stop(signum: int, frame: object) -> None:
        for each in SIGNALS:  # what ends now must not be interrupted
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signum)

    def watch() -> None:
        """Reads the signals' numbers that the C-level handler writes to the socket, even while Python is busy."""
        while received := reader.recv(1):
            if received[0] in SIGNALS and signal.getsignal(received[0]) in (stop, signal.SIG_IGN):
                if not ended.wait(GRACE_SECONDS):
                    Interrupted(received[0]).end_process()
                return

    previous = {signum: signal.signal(signum, stop) for signum in SIGNALS}
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(previous_fd)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        writer.close()
