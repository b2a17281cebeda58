"""The policy on a simulated clock: whose turn it is, and how long anything waits."""

import dataclasses
import random

import pytest

from lattejax.serving.policy import RoundRobin, choose_rows


@dataclasses.dataclass(eq=False)
class Row:
    steps: list[int]  # the groups of its steps
    cost: int
    read: int  # when its prompt was read, in engine steps
    stepped: int = -1
    first: int | None = None


@pytest.mark.parametrize("num_groups", [1, 2, 4, 7])
@pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
def test_a_first_step_comes_within_k_engine_steps_and_none_starves(num_groups, rate):
    """Rows arrive at random with random numbers of steps, at most as many in K engine steps as fit one."""
    chance, policy, most = random.Random(num_groups), RoundRobin(num_groups), 2 * num_groups + 2
    rows, complete, taken = [], [], []
    for clock in range(3000):
        if chance.random() < rate and len(rows) < 32:
            steps = sorted(chance.randrange(num_groups) for _ in range(chance.randint(1, 20)))
            rows.append(Row(steps, chance.choice([1, 2]), clock))
        if not rows:
            continue
        groups = {row.steps[0] for row in rows}
        group = policy.next_group(groups)
        assert group in groups
        taken.append((group, groups))
        chosen = choose_rows((row for row in rows if row.steps[0] == group), most)
        assert chosen and sum(row.cost for row in chosen) <= most
        for row in chosen:
            row.first = clock if row.first is None else row.first
            row.stepped = clock
            row.steps.pop(0)
        complete += [row for row in rows if not row.steps]
        rows = [row for row in rows if row.steps]
    assert len(complete) > 20
    assert max(row.first - row.read for row in complete) < num_groups
    assert all(clock - max(row.stepped, row.read) < 32 * num_groups for row in rows for clock in [2999])
    for i in range(len(taken) - num_groups):  # a group with rows all the time has its turn
        turn = taken[i : i + num_groups]
        for group in set.intersection(*(groups for _, groups in turn)):
            assert group in {ran for ran, _ in turn}


def test_rows_that_have_waited_longest_go_first():
    rows = [Row([0], 2, 0, stepped) for stepped in (5, 3, -1, 4)]
    assert [row.stepped for row in choose_rows(rows, 6)] == [-1, 3, 4]
    assert [row.stepped for row in choose_rows(rows, 7)] == [-1, 3, 4], "a row is never split"
