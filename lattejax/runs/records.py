"""The records in a run's `metrics.jsonl`: one JSON object per line."""

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
