"""The loop that owns the device: it reads prompts, takes steps, and decodes tokens, for all requests together.

A turn reads a drawing's prompt and a chunk of a chat's, takes one step of one timestep-expert group, and decodes one
token of every answer. Requests join and leave between turns, so that none waits for another to be complete.
"""

import collections
import dataclasses
import threading
import time

from lattejax.errors import UserError, first_line
from lattejax.serving.chats import Chats
from lattejax.serving.drawings import Drawings
from lattejax.serving.jobs import Chat, Drawing, Failed, Job

LATE, STOPPING = "late", "stopping"  # reasons of `Failed`


class Full(Exception):
    """The queue is full; it may have room in `seconds`."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} seconds")
        self.seconds = seconds


class Stopping(Exception):
    """The engine takes no more jobs."""


@dataclasses.dataclass
class Counts:
    """How many jobs there are."""

    waiting: int
    running: int


class Engine:
    """Runs jobs in a thread of its own.

    Args:
      drawings: what draws.
      chats: what answers.
      most_waiting: jobs that wait before more are refused.
      wait_seconds: how long a job may wait before it fails.
    """

    def __init__(self, drawings: Drawings, chats: Chats, most_waiting: int, wait_seconds: float):
        self._drawings, self._chats = drawings, chats
        self._most_waiting, self._wait_seconds = most_waiting, wait_seconds
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._is_stopping = self._must_end = False
        self._running = 0
        self.error: BaseException | None = None  # why the engine has ended, if it was an error
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether it takes jobs."""
        return not self._is_stopping

    def counts(self) -> Counts:
        return Counts(len(self._waiting), self._running)

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises:
          Full: too many jobs wait.
          Stopping: the engine takes no more.
        """
        with self._changed:
            if not self.is_running:
                raise Stopping
            if len(self._waiting) >= self._most_waiting:
                waited = time.monotonic() - self._waiting[0].submitted
                raise Full(max(1, min(60, round(waited))))
            self._waiting.append(job)
            self._changed.notify()

    def stop(self, seconds: float) -> None:
        """Takes no more jobs, and ends when those that it has are complete; after `seconds` they fail."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            self._must_end = True
            self._changed.notify()
        self._thread.join()

    # ---- In the engine's thread

    def _run(self) -> None:
        try:
            while self._wait():
                self.turn()
            self._fail(STOPPING)
        except BaseException as error:
            self.error = error
            self._is_stopping = True
            self._fail(first_line(error))

    def _wait(self) -> bool:
        """Waits for something to do; returns whether to continue."""
        with self._changed:
            while not (self._waiting or self._drawings or self._chats):
                if self._is_stopping:
                    return False
                self._changed.wait()
            return not self._must_end

    def turn(self) -> None:
        """Reads, steps and decodes once."""
        self._drop()
        self._read()
        if self._drawings:
            self._drawings.step()
        self._chats.step()
        self._running = len(self._drawings.jobs) + len(self._chats.jobs)

    def _drop(self) -> None:
        """Jobs leave whose clients are gone, or that have waited too long."""
        for running in (self._drawings, self._chats):
            for job in running.jobs:
                if job.is_cancelled:
                    running.drop(job)
        latest = time.monotonic() - self._wait_seconds
        with self._changed:
            late = [job for job in self._waiting if job.submitted < latest and not job.is_cancelled]
            stay = [job for job in self._waiting if job.submitted >= latest and not job.is_cancelled]
            self._waiting = collections.deque(stay)
        for job in late:
            job.tell(Failed(LATE))

    def _read(self) -> None:
        """Reads a chunk of the chat that is being read, and begins a job of each kind that has room: the first to come
        is the first to begin."""
        if self._chats.is_reading:
            self._chats.read()
        with self._changed:
            first = [next((job for job in self._waiting if isinstance(job, kind)), None) for kind in (Drawing, Chat)]
        for job in first:
            if job is not None and self._begin(job):
                with self._changed:
                    self._waiting.remove(job)

    def _begin(self, job: Job) -> bool:
        """Begins a job if there is room; one that is refused fails alone. Returns whether it waits no longer."""
        try:
            if isinstance(job, Chat):
                return self._chats.begin(job)
            if not self._drawings.fits(job):
                return False
            self._drawings.begin(job)
        except UserError as error:
            job.tell(Failed(str(error), is_refusal=True))
        return True

    def _fail(self, reason: str) -> None:
        with self._changed:
            waiting, self._waiting = self._waiting, collections.deque()
        for job in waiting:
            job.tell(Failed(reason))
        self._drawings.fail(reason)
        self._chats.fail(reason)
