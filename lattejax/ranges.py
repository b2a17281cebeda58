"""The numbers that a setting may have, declared with its type: `steps: Annotated[int, Range(0, 100)]`.

Every number in a config has one. The limits are far from useful values: they reject what is not a number, and typing
errors that would take days or all memory.
"""

import dataclasses
import functools
import math
import re
import typing
from typing import Annotated, Any

LARGEST = 2**31 - 1  # int32, which devices count in


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite numbers from `least` to `most`, with or without these two."""

    least: float
    most: float = LARGEST
    above: bool = False  # without `least`
    below: bool = False  # without `most`

    def __contains__(self, value: float) -> bool:
        # In this order: `isfinite` raises an error for an integer of 309 digits.
        if not self.least <= value <= self.most or not math.isfinite(value):
            return False
        return not (self.above and value == self.least) and not (self.below and value == self.most)

    def __str__(self) -> str:
        if not (self.above or self.below):
            return f"from {self.least} to {self.most}"
        low, high = "above" if self.above else "at least", "below" if self.below else "at most"
        return f"{low} {self.least} and {high} {self.most}"


Natural = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
Share = Annotated[float, Range(0, 1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # JAX takes the lower 32 bits of a larger one
Depth = Annotated[int, Range(0, 1000)]  # of a network, in layers or blocks
Size = Annotated[int, Range(1, 2**20)]  # of a weight's axis, or of a batch


def range_of(kind: Any) -> tuple[type, Range] | None:
    """The type and the range of an annotated number, or of a tuple's items."""
    if typing.get_origin(kind) is Annotated:
        return next(((kind.__origin__, each) for each in kind.__metadata__ if isinstance(each, Range)), None)
    return next((found for item in typing.get_args(kind) if (found := range_of(item))), None)


@functools.cache
def ranges(cls: type) -> dict[str, tuple[type, Range]]:
    """The type and the range of each field of a dataclass that has a range."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {field.name: range_of(hints[field.name]) for field in dataclasses.fields(cls)}
    return {name: allowed for name, allowed in found.items() if allowed}


def check_pattern(name: str, value: str) -> None:
    """Raises `ValueError` unless a setting is a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}={value!r} must be a regular expression: {error}") from None


def check_ranges(settings: Any) -> None:
    """Raises `ValueError` unless all numbers of a dataclass are in their ranges; `__post_init__` calls it first."""
    for name, (kind, allowed) in ranges(type(settings)).items():
        value = getattr(settings, name)
        kinds = (int,) if kind is int else (int, float)
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) not in kinds:
                raise ValueError(f"{name}={value!r} must be of type {kind.__name__}")
            if number not in allowed:
                raise ValueError(f"{name}={value!r} must be {allowed}")
