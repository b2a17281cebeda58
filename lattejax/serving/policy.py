"""Which timestep-expert group runs next, and which of its rows.

Groups that have rows take turns, so that a request's first step comes at most K engine steps after its prompt was read,
if the new rows fit one batch.
Within a group the rows that have waited longest go first: new ones before all others.
"""

from collections.abc import Collection, Iterable
from typing import Protocol, TypeVar


class Waiting(Protocol):
    """A row that waits for its next step."""

    stepped: int  # the engine step at which it last ran; -1: never
    cost: int  # rows of a batch that it takes: with guidance two


Row = TypeVar("Row", bound=Waiting)


class RoundRobin:
    """Turns of K groups."""

    def __init__(self, num_groups: int):
        self._num_groups, self._last = num_groups, num_groups - 1

    def next_group(self, groups: Collection[int]) -> int:
        """The first of the `groups` that have rows, after the one that ran last."""
        group = min(groups, key=lambda group: (group - self._last - 1) % self._num_groups)
        self._last = group
        return group


def choose_rows(rows: Iterable[Row], most: int) -> list[Row]:
    """The rows of one step, whose costs add up to at most `most`."""
    chosen, left = [], most
    for row in sorted(rows, key=lambda row: row.stepped):
        if row.cost > left:
            break
        chosen.append(row)
        left -= row.cost
    return chosen
