"""Scores for a model card: the files that `evaluate --reference --out` has written, and a run's final scores."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from lattejax.errors import UserError
from lattejax.files import read_json, resolve_path

# What determines a score, by its key in a result's settings.
SETTINGS = {
    "num": int,
    "guidance": float,
    "num_steps": int,
    "guidance_interval": list,
    "solver": str,
    "shift": float,
    "seed": int,
    "prompts": str,
    "num_prompts": int,
    "prompts_sha256": str,
    "weights": str,
    "dtype": str,
    "image_size": int,
    "quantisation": str,
    "inception_sha256": str,
    "reference_sha256": str,
}
DESCRIPTIONS = ("device", "inception_precision", "lattejax_version", "jax_version")


@dataclasses.dataclass(frozen=True)
class Result:
    """The scores of one set of drawings against a reference."""

    name: str  # of it, in errors
    figures: dict[str, float]
    monitor: tuple[str, ...]  # why it must not be published as FID-50K; empty: it may
    settings: dict[str, Any]  # those of SETTINGS, at least
    reference: str  # the reference's file, without its directory
    reference_description: str
    described: dict[str, str]  # DESCRIPTIONS

    @classmethod
    def parse(cls, values: Any, where: str) -> "Result":
        """Checks a result from a JSON file; raises `UserError`, with `where`, if it is none."""
        values = values if isinstance(values, dict) else {}
        settings, figures, reference = (values.get(key) for key in ("settings", "figures", "reference"))
        monitor = values.get("only_a_monitor_because")
        settings = settings if isinstance(settings, dict) else {}
        if "npz_sha256" in settings:
            raise UserError(
                f"{where} judges the pictures of an .npz, which anything may have drawn; take the scores with --workdir"
            )
        wrong = [f"settings.{key}" for key, kind in SETTINGS.items() if not _is(settings.get(key), kind)]
        wrong += [key for key in DESCRIPTIONS if not _is(values.get(key), str)]
        if not isinstance(figures, dict) or not figures or not all(_is(value, float) for value in figures.values()):
            wrong.append("figures")
        if not isinstance(monitor, list) or not all(_is(reason, str) for reason in monitor):
            wrong.append("only_a_monitor_because")
        reference = reference if isinstance(reference, dict) else {}
        description = reference.get("description")
        wrong += ["reference.file"] * (not _is(reference.get("file"), str))
        wrong += ["reference.description"] * (not isinstance(description, str | dict))
        if wrong:
            raise UserError(
                f"{where} has no scores of `evaluate --workdir --reference --out`: {', '.join(wrong):.150} "
                "is missing or wrong"
            )
        return cls(
            where,
            figures,
            tuple(monitor),
            settings,
            epath.Path(reference["file"]).name,
            description if isinstance(description, str) else _described(description),
            {key: values[key] for key in DESCRIPTIONS},
        )


def _described(description: dict[str, Any]) -> str:
    """How one of our own references was made; its source may be a path, which is left out."""
    return f"{description.get('num', '?')} pictures, {description.get('preprocessing', 'nobody knows how prepared')}"


def _is(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a kind; an int passes for a float, and a float must be finite."""
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def read_results(paths: Sequence[str]) -> list[Result]:
    """Reads the results in several files; raises `UserError` if one is missing, or is none."""
    results = []
    for path in paths:
        found = read_json(resolve_path(path)).get("results")
        if not isinstance(found, list) or not found:
            raise UserError(f"--scores={path} has no results; it must be an --out of `evaluate --workdir --reference`")
        results += [Result.parse(each, f"--scores={path}, result {i}") for i, each in enumerate(found, 1)]
    return results


def final_scores(path: epath.Path) -> dict[str, float]:
    """The figures of a run's final scores, by their names in its results.json; none before it has ended."""
    if not path.exists():
        return {}
    return {name: value for name, value in read_json(path).items() if _is(value, float) and name != "seconds"}
