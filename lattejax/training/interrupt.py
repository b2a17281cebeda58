"""Stopping on request without losing work.

On SIGTERM, SIGINT or a preemption notice, training saves after the current step and exits. Python runs signal handlers
only between its own instructions, so not while XLA compiles or the process waits for a device. Therefore a thread
watches for signals; if nothing is unsaved, it ends the process at once, and with it all others: they cannot be ahead by
a complete step, which all compute together. Otherwise all stop after a step that they agree on (`loop.Stop`).
"""

import http.client
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable

from lattejax.errors import UserError
from lattejax.interrupts import SIGNALS, Interrupted
from lattejax.parallel import hosts

SECONDS_BETWEEN_NOTICES = 5.0
SECONDS_BETWEEN_CHECKS = 0.05


class InterruptGuard:
    """A context manager: within it, the first SIGINT or SIGTERM only sets `signum`; a second one acts as usual.

    Args:
      at_once: end the process, as `Interrupted` does, as soon as nothing is unsaved, even in the middle of a step.
      notice: a URL that is polled every five seconds and answers TRUE when the machine is about to be preempted, which
        counts as SIGTERM; on Google Cloud http://metadata.google.internal/computeMetadata/v1/instance/preempted.
    """

    def __init__(self, at_once: bool = False, notice: str = ""):
        self.signum: int | None = None
        if notice and not re.match(r"https?://[^/\s]+", notice):
            raise UserError(f"--preemption_notice={notice} must be a URL, http://… or https://…")
        self._at_once, self._notice = at_once, notice
        self._finish: Callable[[], None] | None = lambda: None
        self._previous = {}
        self._ended = threading.Event()

    # ---- Called by the training loop

    def unsaved(self) -> None:
        """From here on, ending the process would lose work."""
        self._finish = None

    def saved(self, finish: Callable[[], None] = lambda: None) -> None:
        """From here on, ending the process loses nothing once `finish` has returned."""
        self._finish = finish
        hosts.finish_before_end(finish)

    # ---- Signals

    def __enter__(self) -> "InterruptGuard":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, self._handle)
        threading.Thread(target=self._watch, daemon=True).start()
        if self._notice:
            threading.Thread(target=self._ask_for_notice, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._restore()
        self._writer.close()

    def _restore(self) -> None:
        """Restores the previous signal handlers."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
        if self._previous_fd is not None:
            signal.set_wakeup_fd(self._previous_fd)
            self._previous_fd = None

    def _handle(self, signum: int, frame: object) -> None:
        self._stop(signum)
        self._restore()

    def _stop(self, signum: int) -> None:
        if self.signum is None:
            self.signum = signum
            print("stopping after this step to save; interrupt again to stop at once", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        """Reads the signals' numbers that the C-level handler writes to the socket, even while Python is busy."""
        while self.signum is None:
            received = self._reader.recv(1)
            if not received:  # the guard has been exited
                return
            if received[0] in SIGNALS:
                self._stop(received[0])
        while self._at_once and not self._ended.is_set():
            if (finish := self._finish) is not None:
                with hosts.reported():
                    finish()
                hosts.end(Interrupted(self.signum))
            time.sleep(SECONDS_BETWEEN_CHECKS)

    def _ask_for_notice(self) -> None:
        request = urllib.request.Request(self._notice, headers={"Metadata-Flavor": "Google"})
        warned = False
        while not self._ended.is_set():
            try:
                with urllib.request.urlopen(request, timeout=SECONDS_BETWEEN_NOTICES) as response:
                    preempted = response.read(16).strip().upper() == b"TRUE"
            except (OSError, ValueError, http.client.HTTPException) as error:
                preempted = False
                if not warned:
                    print(f"cannot read a preemption notice from {self._notice}: {error}", file=sys.stderr, flush=True)
                warned = True
            if preempted:
                print("preemption notice: this machine is about to be preempted", file=sys.stderr, flush=True)
                self._stop(signal.SIGTERM)
                self._writer.send(bytes([signal.SIGTERM]))
                return
            self._ended.wait(SECONDS_BETWEEN_NOTICES)
