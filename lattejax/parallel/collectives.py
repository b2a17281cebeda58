"""Which collectives a compiled program runs, and how much each chip sends in them, parsed from its HLO text."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((.*)$")
_SHAPE = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=\{?(%?[\w.\-]+(?:, *%?[\w.\-]+)*)")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of collective: how often it runs in a call of the program, and how much a chip sends."""

    count: int = 0
    sent_bytes: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.sent_bytes + other.sent_bytes)

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(self.count * times, self.sent_bytes * times)


def traffic(hlo: str, num_devices: int) -> dict[str, Traffic]:
    """Returns the traffic of each kind of collective in a call of a compiled program.

    A collective in a loop counts as often as the loop runs. With n participating chips, each sends 2(n-1)/n of an
    all-reduce's data, (n-1)/n of an all-gather's output, a reduce-scatter's input or an all-to-all's data, and all of
    a permutation's: the cost of the best ring algorithms. The TPU compiler may list one collective in several
    computations, so each channel id is counted once.

    Args:
      hlo: the program's text, `compiled.as_text()`.
      num_devices: of the mesh.

    Raises:
      ValueError: the trip count of a loop with collectives is unknown.
    """
    bodies, entry = _computations(hlo)
    done: dict[str, dict[str, Traffic]] = {}
    channels: set[str] = set()

    def of_computation(name: str) -> dict[str, Traffic]:
        if name not in done:
            done[name] = _total(of_line(line, name) for line in bodies.get(name, ()))
        return done[name]

    def of_line(line: str, computation: str) -> dict[str, Traffic]:
        if loop := _LOOP.search(line):
            inside = of_computation(loop[2])
            times = _trip_count(line, bodies[loop[1]]) if inside else 0
            return {kind: one * times for kind, one in inside.items()}
        if collective := _COLLECTIVE.search(line):
            channel = re.search(r"channel_id=\d+", line)
            if channel and channel[0] in channels:
                return {}
            channels.update([channel[0]] if channel else [])
            return dict([_one(collective, num_devices, computation)])
        if called := _CALLED.search(line):
            return _total(of_computation(name.strip().lstrip("%")) for name in called[1].split(","))
        return {}

    return of_computation(entry)


def _total(parts: Iterable[dict[str, Traffic]]) -> dict[str, Traffic]:
    found = collections.defaultdict(Traffic)
    for part in parts:
        for kind, one in part.items():
            found[kind] += one
    return dict(found)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the entry's name."""
    bodies, name, entry = {}, None, ""
    for line in hlo.splitlines():
        if not line.startswith(" ") and (start := _COMPUTATION.match(line)):
            name = start[2]
            bodies[name] = []
            entry = name if start[1] else entry
        elif name is not None and line.startswith(" "):
            bodies[name].append(line)
    return bodies, entry


def _one(collective: re.Match, num_devices: int, computation: str) -> tuple[str, Traffic]:
    shapes, kind, start, rest = collective.groups()
    sizes = [_size(*shape) for shape in _SHAPE.findall(re.sub(r"u32\[\](\{[^}]*\})?", "", shapes))]
    members, total = _members(rest, num_devices), sum(sizes)
    if kind == "collective-permute":
        return kind, Traffic(1, total / 2 if start else total)  # the result of a -start also lists its operand
    if kind in ("all-gather", "reduce-scatter") and start:
        total = total * members / (members + 1)
    elif kind == "reduce-scatter":
        total *= members
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # the TPU's form of it: every chip keeps a part of the sum
    share = (members - 1) / members
    return kind, Traffic(1, (2 if kind == "all-reduce" else 1) * share * total)


def _size(kind: str, dimensions: str) -> int:
    size = BYTES[kind]
    for dimension in filter(None, dimensions.split(",")):
        size *= int(dimension)
    return size


def _members(attributes: str, num_devices: int) -> int:
    """The number of chips in each replica group. Groups are listed, or written as [groups,members]<=[…] or as mesh
    axes."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if shape := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(shape[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    return num_devices


def _trip_count(line: str, condition: list[str]) -> int:
    if known := re.search(r"known_trip_count[^\d]*(\d+)", line):
        return int(known[1])
    constants = dict(re.findall(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", "\n".join(condition)))
    for operand in re.findall(r"compare\(([^)]*)\), direction=LT", "\n".join(condition)):
        for name in operand.split(","):
            if name.strip().split(" ")[-1].lstrip("%") in constants:
                return int(constants[name.strip().split(" ")[-1].lstrip("%")])
    raise ValueError(f"the trip count of a loop is unknown: {line.strip()[:200]}")
