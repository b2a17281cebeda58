"""Stopping a command on SIGINT (Ctrl-C) or SIGTERM: one line, and an exit code that tells which.

Training has its own guard, which saves first (`training.interrupt`).
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

TRY_AGAIN = 75  # EX_TEMPFAIL: the same command resumes; launchers run it again
SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 3.0


class Interrupted(BaseException):
    """A command has stopped on request; `signum` is the signal that requested it.

    As with `KeyboardInterrupt`, what handles a library's errors does not handle it.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command again")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """75 for a preemption (SIGTERM); otherwise the shell convention, 128 + signum."""
        return TRY_AGAIN if self.signum == signal.SIGTERM else 128 + self.signum


@contextlib.contextmanager
def interruptible(end: Callable[[Interrupted], None]) -> Iterator[None]:
    """Within it, the first SIGINT or SIGTERM raises `Interrupted` in the main thread.

    Python runs signal handlers only between its own instructions, so not while XLA compiles. Therefore a thread watches
    too: it calls `end`, which ends the process, if the main thread does not react in `GRACE_SECONDS`.
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
                    end(Interrupted(received[0]))
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
