"""The records in a run's `metrics.jsonl`: one JSON object per line."""

import math
from collections.abc import Iterable
from typing import Any

from etils import epath

from lattejax.errors import UserError
from lattejax.files import parse_json, read_text

KEYS = {"stage": str, "step": int, "seconds": float}  # of every record


def read_records(path: epath.Path) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`; a run that has not logged yet has none. Raises `UserError` for a line that is none."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        records.append(parse_json(line, f"{path}, line {number},"))
        if wrong := [key for key, kind in KEYS.items() if type(records[-1].get(key)) is not kind]:
            raise UserError(f"{path}, line {number}, is no record of metrics: {', '.join(wrong)} is missing or wrong")
    return records


def best_step(records: Iterable[dict[str, Any]], best: str, steps: Iterable[int]) -> int | None:
    """The step whose evaluation in the second stage has the best figure, the first of several.

    A figure that is not finite is never the best.

    Args:
      records: a run's records.
      best: as config.checkpoint.best, "lowest held_out_loss"; empty: none.
      steps: the steps to choose from.
    """
    direction, _, name = best.partition(" ")
    sign, steps = {"lowest": 1, "highest": -1}.get(direction, 0), set(steps)
    found = [
        (sign * record[name], record["step"])
        for record in records
        if record["stage"] == "train" and record["step"] in steps
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    ]
    return min(found)[1] if found else None
