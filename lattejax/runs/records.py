"""The records in a run's `metrics.jsonl`: one JSON object per line."""

import json
from typing import Any

from etils import epath


def read_records(path: epath.Path) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`; a run that has not logged yet has none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
