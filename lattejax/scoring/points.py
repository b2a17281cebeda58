"""Scores that can be published: sets of pictures against a reference, one after the other, each resumable.

The file of results is written after each set. Sets that it already has are not made again.
"""

import contextlib
import dataclasses
import glob
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from lattejax.errors import UserError, parsing
from lattejax.evaluation.adm import ReferenceFile, write_samples
from lattejax.evaluation.features import PRECISION, FeatureExtractor
from lattejax.evaluation.pictures import FEWEST, PUBLISHED, Reference, score_pictures
from lattejax.evaluation.precision_recall import DISTANCES
from lattejax.evaluation.sample_sets import OF_A_FILE
from lattejax.files import read_json, remove_directory, remove_leftovers, write_atomically
from lattejax.leases import one_writer
from lattejax.parallel import hosts
from lattejax.scoring.parts import Parts, ReadPictures
from lattejax.scoring.reference import open_reference, parts_directory

REFERENCE = "reference"  # the directory of its parts
PICTURES = 10_000  # pictures of published references, for precision and recall
OF_POINTS = ("guidance", "num_steps")  # settings that may differ between the results of a file


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """One set of pictures to score."""

    name: str  # of its files
    settings: dict[str, Any]  # everything that determines the pictures
    shape: tuple[int, int, int, int]
    open: Callable[[], ReadPictures]  # called only if its pictures must be read


def score_points(
    points: Sequence[Point],
    reference: ReferenceFile,
    extractor: FeatureExtractor,
    out: epath.Path,
    *,
    part: int,
    keep_pictures: bool,
) -> list[dict[str, Any]]:
    """Scores every point; all processes must call it.

    Returns the results on the first process, and none on others. They are also in `out`, which only the first reads.

    Args:
      points: the sets.
      reference: what they are compared with.
      extractor: computes features.
      out: the .json file of results.
      part: pictures in a part of the work.
      keep_pictures: whether each set is also written as a sample file of ADM's evaluator, beside `out`.

    Raises:
      UserError: a set has too few pictures, `out` has results that cannot be compared with these, or one of a set
        whose pictures were not kept and now should be, or another process writes them.
    """
    for point in points:
        if point.shape[0] < FEWEST:
            raise UserError(f"{point.shape[0]} pictures are too few to score; at least {FEWEST} are needed")
    judged = {"inception_sha256": extractor.weights.sha256, "reference_sha256": reference.sha256}
    wanted = [json.loads(json.dumps(point.settings | judged)) for point in points]
    directory = parts_directory(out)
    with one_writer(directory, str(out), hosts.end_all) if hosts.is_first() else contextlib.nullcontext():
        if hosts.is_first():
            for file in (out, *(_kept(point, out) for point in points)):
                remove_leftovers(file.parent, f"{glob.escape(file.name)}.*")
        results = _earlier(out, wanted[0]) if hosts.is_first() else []
        exist = hosts.from_first(np.array([_find(results, own) is not None for own in wanted]))
        missing = [(p, own) for p, own, there in zip(points, wanted, exist, strict=True) if not there]
        if keep_pictures and hosts.is_first():
            _check_kept(points, [point for point, _ in missing], out)
        if missing:
            compared = open_reference(reference, directory / REFERENCE, extractor, part)
        for point, settings in missing:
            found = _score(point, compared, extractor, out, directory / point.name, part, keep_pictures)
            if hosts.is_first():
                results.append(found | _describe(point, settings, extractor, reference, compared))
                write_atomically(out, (json.dumps({"results": results}, indent=2) + "\n").encode())
                remove_directory(directory / point.name)  # a sweep needs room for one set only
        if hosts.is_first():
            _remove(directory, [point.name for point in points])
        hosts.wait_for_all("the results are written")
    return [found for settings in wanted if (found := _find(results, settings)) is not None]


def _kept(point: Point, out: epath.Path) -> epath.Path:
    """Where a set's pictures are kept."""
    return out.with_name(f"{out.stem}_{point.name}.npz")


def _check_kept(points: Sequence[Point], missing: Sequence[Point], out: epath.Path) -> None:
    for point in points:
        if point not in missing and not _kept(point, out).exists():
            raise UserError(
                f"{out} has the scores of {point.name} already, whose pictures were not kept; to draw them again, "
                "choose another --out"
            )


def _score(
    point: Point,
    reference: Reference,
    extractor: FeatureExtractor,
    out: epath.Path,
    directory: epath.Path,
    part: int,
    keep_pictures: bool,
) -> dict[str, Any]:
    """Makes the set; returns its figures, and where they were computed, on the first process."""
    settings = point.settings | {"inception_sha256": extractor.weights.sha256}
    kept = np.full(point.shape[0], keep_pictures)
    parts = Parts.open(directory, settings, part=part, kept=kept, picture=point.shape[1:])
    parts.fill(point.open(), extractor, point.name)
    if not hosts.is_first():
        return {}
    if keep_pictures:
        write_samples(_kept(point, out), point.shape, parts.pictures())
    figures = score_pictures(parts.features(), point.shape[0], parts.pool, reference)
    return {"figures": figures} | parts.computed_on


def _describe(
    point: Point,
    settings: dict[str, Any],
    extractor: FeatureExtractor,
    file: ReferenceFile,
    reference: Reference,
) -> dict[str, Any]:
    """What determined a result."""
    return {
        "only_a_monitor_because": list(_only_a_monitor_because(point, extractor, file)),
        "left_out": reference.left_out,
        "settings": settings,
        "shape": list(point.shape),
        "reference": {
            "file": str(file.path),
            "pictures": 0 if file.pictures is None else len(file.pictures),
            "description": file.description or "the file does not say how it was made",
        },
        "inception_precision": PRECISION,
        "distances": DISTANCES,
    }


def _only_a_monitor_because(point: Point, extractor: FeatureExtractor, file: ReferenceFile) -> Iterator[str]:
    """Why a result must not be published as FID-50K."""
    num, *picture = point.shape
    if num != PUBLISHED:
        yield f"{num:,} pictures, not {PUBLISHED:,}"
    if not extractor.weights.are_published:
        yield "the Inception weights are not the published ones"
    if prompts := point.settings.get("num_prompts"):
        if num % prompts:
            yield f"{num:,} pictures are not the same number for each of {prompts:,} prompts"
        if point.settings["prompts"] == OF_A_FILE:
            yield "the prompts are those of a file, not of the data"
    if file.pictures is not None:
        if file.pictures.shape[1:] != tuple(picture):
            sizes = ("x".join(map(str, shape[:2])) for shape in (picture, file.pictures.shape[1:]))
            yield "pictures of {} pixels, a reference of {}".format(*sizes)
        if len(file.pictures) != PICTURES:
            yield f"precision and recall are against {len(file.pictures):,} pictures, not {PICTURES:,}"
    of_reference = file.description.get("inception_sha256", extractor.weights.sha256)
    if of_reference != extractor.weights.sha256:
        yield f"the reference was made with other Inception weights ({of_reference!s:.16})"
    if file.is_pytorch_fids:
        yield (
            "the reference has only mu and sigma, as of pytorch-fid, which resizes pictures in another way unless they "
            "have 299 pixels"
        )


def _earlier(out: epath.Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The results that a file has already; raises `UserError` if they differ in more than guidance and steps."""
    if not out.exists():
        return []
    with parsing(f"{out}, which may be removed,"):
        results = read_json(out)["results"]
        for result in results:
            found = result["settings"]
            keys = [key for key in {**wanted, **found} if key not in OF_POINTS and found.get(key) != wanted.get(key)]
            if keys:
                changes = "; ".join(f"{key}: {found.get(key)!r} -> {wanted.get(key)!r}" for key in sorted(keys))
                raise UserError(f"{out} has results of other settings ({changes:.250}); choose another --out")
    return results


def _find(results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any] | None:
    return next((result for result in results if result["settings"] == settings), None)


def _remove(directory: epath.Path, names: Sequence[str]) -> None:
    """Removes the parts of these sets, which a killed process may have left, and those of the reference unless another
    set is unfinished."""
    if not directory.exists():
        return
    remove_leftovers(directory)
    for name in names:
        if (directory / name).exists():
            remove_directory(directory / name)
    if not any(each.name != REFERENCE for each in directory.iterdir()):
        remove_directory(directory)
