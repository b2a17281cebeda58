"""The answers in flight: prompts that are read, chunk by chunk, and answers that get their next tokens together."""

import collections

from lattejax.sampling.conversations import Answer, Conversations
from lattejax.serving.jobs import Chat, Done, Failed, Token
from lattejax.serving.metrics import Metrics


class Chats:
    """All chats that have begun, stepped by `read` and `step`."""

    def __init__(self, conversations: Conversations, metrics: Metrics):
        self._conversations, self._metrics = conversations, metrics
        self._answers: dict[Chat, Answer] = {}
        self._reading: collections.deque[Chat] = collections.deque()

    def __bool__(self) -> bool:
        return bool(self._answers)

    @property
    def jobs(self) -> list[Chat]:
        return list(self._answers)

    @property
    def is_reading(self) -> bool:
        """Whether a prompt is not read to its end yet."""
        return bool(self._reading)

    def begin(self, job: Chat) -> bool:
        """Takes a row for the job; returns whether there was one."""
        answer = self._conversations.begin(job.prompt, job.decoding, job.top_logprobs)
        if answer is None:
            return False
        self._answers[job] = answer
        self._reading.append(job)
        self._metrics.read(len(job.prompt.input_ids) - answer.cached, answer.cached)
        return True

    def read(self) -> None:
        """Reads a chunk of the first prompt that is not read to its end."""
        job = self._reading[0]
        self._conversations.read(self._answers[job])
        if self._answers[job].is_read:
            self._reading.popleft()
            self._tell(job)

    def step(self) -> None:
        """Decodes a token of every answer whose prompt has been read."""
        jobs = [job for job, answer in self._answers.items() if answer.is_read]
        if jobs:
            self._conversations.step([self._answers[job] for job in jobs])
            for job in jobs:
                self._tell(job)

    def _tell(self, job: Chat) -> None:
        answer = self._answers[job]
        job.tell(Token(answer.tokens[-1], answer.logprobs[-1] if answer.logprobs else None, answer.cached))
        self._metrics.decoded()
        if answer.is_complete:
            self.drop(job)
            job.tell(Done())

    def drop(self, job: Chat) -> None:
        """The job's row leaves; what was read is kept for the next turn."""
        self._conversations.end(self._answers.pop(job))
        if job in self._reading:
            self._reading.remove(job)

    def fail(self, reason: str) -> None:
        """All answers end."""
        for job in self.jobs:
            self.drop(job)
            job.tell(Failed(reason))
