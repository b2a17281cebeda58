"""The drawings in flight: which rows there are, what they hold, and their next steps."""

import collections
import dataclasses
from collections.abc import Iterator

import jax

from lattejax.serving.drawing import Drawer, Part
from lattejax.serving.jobs import Done, Drawing, Failed, Picture, Progress
from lattejax.serving.metrics import Metrics
from lattejax.serving.policy import RoundRobin, choose_rows
from lattejax.serving.steps import Evaluation, edges, evaluations

EMPTY = 0  # the slot of the empty prompt's context
STEPS_AHEAD = 1  # steps in the device's queue behind the running one


@dataclasses.dataclass(eq=False)
class Row:
    """One picture in flight."""

    job: Drawing
    index: int
    slot: int
    contexts: tuple[int, int]
    steps: tuple[Evaluation, ...]
    previews: tuple[int, ...]  # the evaluations after which there is one
    at: int = 0  # the next evaluation
    stepped: int = -1

    @property
    def group(self) -> int:
        return self.steps[self.at].group

    @property
    def cost(self) -> int:
        return 2 if self.steps[self.at].is_guided else 1

    @property
    def part(self) -> Part:
        return Part(self.slot, *self.contexts, self.job.sampling.guidance, self.steps[self.at])


class ContextSlots:
    """Which prompt's context is in which slot: contexts of recent prompts are kept, and need not be read again."""

    def __init__(self, count: int):
        self._slots: collections.OrderedDict[tuple, int] = collections.OrderedDict()  # the least recently used first
        self._free = list(range(EMPTY + 1, count))
        self._users = collections.Counter()

    def available(self) -> int:
        return len(self._free) + sum(not self._users[slot] for slot in self._slots.values())

    def take(self, prompt: tuple) -> tuple[int, bool]:
        """A slot for a prompt's tokens, and whether its context must be read; one must be available."""
        if is_new := prompt not in self._slots:
            if not self._free:
                oldest = next(key for key, slot in self._slots.items() if not self._users[slot])
                self._free.append(self._slots.pop(oldest))
            self._slots[prompt] = self._free.pop()
        self._slots.move_to_end(prompt)
        self._users[self._slots[prompt]] += 1
        return self._slots[prompt], is_new

    def release(self, slot: int) -> None:
        self._users[slot] -= 1


class Drawings:
    """All drawings that have begun, stepped by `step`."""

    def __init__(self, drawer: Drawer, context_slots: int, metrics: Metrics):
        self._drawer, self._metrics = drawer, metrics
        self._contexts = ContextSlots(context_slots)
        self._free = list(range(drawer.padding))
        self._rows: list[Row] = []
        self._policy = RoundRobin(drawer.config.num_groups)
        self._clock = 0
        self._ahead: collections.deque[jax.Array] = collections.deque()

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def jobs(self) -> list[Drawing]:
        return list(dict.fromkeys(row.job for row in self._rows))

    def fits(self, job: Drawing) -> bool:
        """Whether the job can begin now."""
        return job.count <= len(self._free) and self._contexts.available() >= 1 + (job.negative is not None)

    def begin(self, job: Drawing) -> None:
        """Reads the prompts, unless their contexts are kept, and draws the noise.

        Raises:
          UserError: a prompt is too long. Nothing has changed then.
        """
        prompts, contexts = [job.prompt] if job.negative is None else [job.prompt, job.negative], []
        for prompt in prompts:
            self._drawer.check(prompt)
        for prompt in prompts:
            slot, is_new = self._contexts.take(tuple(prompt.input_ids.tolist()))
            if is_new:
                self._drawer.read(prompt, slot)
            contexts.append(slot)
        steps = evaluations(self._drawer.config.intervals, job.sampling)
        slots = [self._free.pop() for _ in range(job.count)]
        self._drawer.begin(slots, job.seed)
        own = (contexts[0], contexts[1] if len(contexts) > 1 else EMPTY), steps, edges(steps, job.previews)
        self._rows += [Row(job, index, slot, *own) for index, slot in enumerate(slots)]

    def drop(self, job: Drawing) -> None:
        """The job's rows leave."""
        for row in [row for row in self._rows if row.job is job]:
            self._leave(row)

    def step(self) -> None:
        """Takes one step of one group."""
        group = self._policy.next_group({row.group for row in self._rows})
        rows = choose_rows((row for row in self._rows if row.group == group), self._drawer.sizes[-1])
        self._ahead.append(self._drawer.step(group, [row.part for row in rows]))
        self._metrics.stepped(group, len(rows))
        self._clock += 1
        for row in rows:
            row.at += 1
            row.stepped = self._clock
        self._tell_progress(rows)
        self._develop(rows)
        if len(self._ahead) > STEPS_AHEAD:
            jax.block_until_ready(self._ahead.popleft())

    def _tell_progress(self, rows: list[Row]) -> None:
        for row in {row.job: row for row in rows if row.job.wants_progress}.values():
            steps = sum(step.ends_step for step in row.steps[: row.at])
            row.job.tell(Progress(row.steps[row.at - 1].group, steps, row.job.sampling.num_steps))

    def _develop(self, rows: list[Row]) -> None:
        """Begins to decode what is complete or due for a preview; complete rows leave."""
        due = [row for row in rows if row.at == len(row.steps) or row.at - 1 in row.previews]
        left = [1 - row.steps[row.at - 1].end for row in due]
        for (pixels, place), row in zip(self._pixels(due, left), due, strict=False):
            is_complete = row.at == len(row.steps)
            preview = None if is_complete else row.previews.index(row.at - 1)
            row.job.tell(Picture(row.index, preview, pixels, place))
            if is_complete:
                self._leave(row)
                if all(other.job is not row.job for other in self._rows):
                    row.job.tell(Done())

    def _pixels(self, rows: list[Row], left: list[float]) -> Iterator[tuple[jax.Array, int]]:
        for pixels in self._drawer.develop([row.slot for row in rows], left):
            yield from ((pixels, place) for place in range(len(pixels)))

    def _leave(self, row: Row) -> None:
        self._rows.remove(row)
        self._free.append(row.slot)
        if all(other.job is not row.job for other in self._rows):
            for slot in row.contexts:
                if slot != EMPTY:
                    self._contexts.release(slot)

    def fail(self, reason: str) -> None:
        """All drawings end."""
        for job in self.jobs:
            self.drop(job)
            job.tell(Failed(reason))
