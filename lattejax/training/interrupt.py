"""Stopping when asked to, so that nothing is lost, and starting again where it makes sense.

Asked by SIGTERM, by SIGINT or by a preemption notice, training saves after the step under way and ends. Python runs its
signal handlers between two of its own instructions, so not while XLA compiles or a device is waited for; hence a thread
watches, and if at that moment nothing is unsaved, it ends the process at once. Not where it is one of several: those
end together, after a step that they agree on (`loop.Stop`).
"""

import http.client
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable

TRY_AGAIN = 75  # EX_TEMPFAIL: the same command goes on; launchers do that
SECONDS_BETWEEN_NOTICES = 5.0
SECONDS_BETWEEN_LOOKS = 0.05


def exit_code(signum: int) -> int:
    """75 where somebody else wants the machine, and what shells expect of Ctrl-C."""
    return TRY_AGAIN if signum == signal.SIGTERM else 128 + signum


class Interrupted(Exception):
    """Training was asked to stop, and has saved; `signum` is the signal that asked."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command to go on")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return exit_code(self.signum)


class InterruptGuard:
    """While it is entered, the first SIGINT or SIGTERM only sets `signum`; a second one acts as it always does.

    Args:
      at_once: end the process, with `exit_code`, as soon as nothing is unsaved, whatever is under way.
      notice: a URL that is asked every five seconds and answers TRUE when the machine is about to be taken, which
        counts as SIGTERM; on Google Cloud http://metadata.google.internal/computeMetadata/v1/instance/preempted.
    """

    def __init__(self, at_once: bool = False, notice: str = ""):
        self.signum: int | None = None
        self.among_others = False  # set where this process is one of several
        self._at_once, self._notice = at_once, notice
        self._finish: Callable[[], None] | None = lambda: None
        self._previous = {}
        self._ended = threading.Event()

    # ---- What the training loop tells

    def unsaved(self) -> None:
        """From here on something would be lost."""
        self._finish = None

    def saved(self, finish: Callable[[], None] = lambda: None) -> None:
        """From here on nothing would be lost, once `finish` has returned."""
        self._finish = finish

    # ---- Signals

    def __enter__(self) -> "InterruptGuard":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._note)
        threading.Thread(target=self._watch, daemon=True).start()
        if self._notice:
            threading.Thread(target=self._ask_for_notice, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._restore()
        self._writer.close()

    def _restore(self) -> None:
        """Signals act as they always do."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
        if self._previous_fd is not None:
            signal.set_wakeup_fd(self._previous_fd)
            self._previous_fd = None

    def _note(self, signum: int, frame: object) -> None:
        self._stop(signum)
        self._restore()

    def _stop(self, signum: int) -> None:
        if self.signum is None:
            self.signum = signum
            print("stopping after this step, to save; once more to stop at once", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        """The C-level handler writes a signal's number to the socket whatever Python is busy with."""
        while self.signum is None:
            heard = self._reader.recv(1)
            if not heard:  # the guard was left
                return
            if heard[0] in (signal.SIGINT, signal.SIGTERM):
                self._stop(heard[0])
        while self._at_once and not self._ended.is_set():
            if not self.among_others and (finish := self._finish) is not None:
                finish()
                print(Interrupted(self.signum), file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(exit_code(self.signum))
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _ask_for_notice(self) -> None:
        request = urllib.request.Request(self._notice, headers={"Metadata-Flavor": "Google"})
        complained = False
        while not self._ended.is_set():
            try:
                with urllib.request.urlopen(request, timeout=SECONDS_BETWEEN_NOTICES) as response:
                    taken = response.read(16).strip().upper() == b"TRUE"
            except (OSError, ValueError, http.client.HTTPException) as error:
                taken = False
                if not complained:
                    print(f"no preemption notice can be had from {self._notice}: {error}", file=sys.stderr, flush=True)
                complained = True
            if taken:
                print("preemption notice: this machine is about to be taken", file=sys.stderr, flush=True)
                self._stop(signal.SIGTERM)
                self._writer.send(bytes([signal.SIGTERM]))
                return
            self._ended.wait(SECONDS_BETWEEN_NOTICES)
