"""Reference statistics: the file that pictures are compared with, made and read."""

import contextlib
import glob

import numpy as np
from etils import epath

from lattejax.errors import UserError
from lattejax.evaluation.adm import FEWEST, ReferenceFile, write_reference
from lattejax.evaluation.features import PRECISION, FeatureExtractor
from lattejax.evaluation.pictures import Reference, Statistics
from lattejax.files import remove_leftovers, resolve_path
from lattejax.leases import one_writer
from lattejax.parallel import hosts
from lattejax.scoring.parts import Parts
from lattejax.scoring.sources import PictureSource, open_samples


def parts_directory(out: epath.Path) -> epath.Path:
    """Where unfinished work for a file is kept."""
    return out.with_name(f"{out.name}.parts")


def make_reference(
    source: PictureSource, out: epath.Path, extractor: FeatureExtractor, *, pictures: int, part: int
) -> None:
    """Writes a reference file: statistics of all pictures, and some of them, for precision and recall.

    Args:
      source: the pictures.
      out: the file to write.
      extractor: computes their features.
      pictures: how many pictures the file has itself, at most: a fixed random choice.
      part: pictures in a part of the work.

    Raises:
      UserError: they are too few, they cannot be read, or another process makes the same file.
    """
    total = source.shape[0]
    if min(total, pictures) < FEWEST:
        raise UserError(f"{min(total, pictures)} pictures are too few for a reference; at least {FEWEST} are needed")
    kept = np.zeros(total, bool)
    kept[np.random.default_rng(0).permutation(total)[:pictures]] = True
    settings = {
        "source": source.identity,
        "version": source.version,
        "preprocessing": source.preprocessing,
        "inception": extractor.weights.sha256,
    }
    directory = parts_directory(out)
    with one_writer(directory, str(out), hosts.end_all) if hosts.is_first() else contextlib.nullcontext():
        if hosts.is_first():
            remove_leftovers(out.parent, f"{glob.escape(out.name)}.*")
        parts = Parts.open(directory, settings, part=part, kept=kept, picture=source.shape[1:])
        parts.fill(source.read, extractor, str(out))
        if hosts.is_first():
            _write(source, out, extractor, parts)
            parts.remove()
        hosts.wait_for_all("the reference is written")


def _write(source: PictureSource, out: epath.Path, extractor: FeatureExtractor, parts: Parts) -> None:
    statistics = Statistics()
    for features in parts.features():
        statistics.add(features)
    description = {
        "preprocessing": source.preprocessing,
        "num": source.shape[0],
        "source": source.identity,
        "pictures_sha256": parts.sha256,
        "inception_sha256": extractor.weights.sha256,
        "precision": PRECISION,
    } | parts.computed_on
    shape = (int(parts.kept.sum()), *source.shape[1:])
    write_reference(out, statistics.pool, statistics.spatial, shape, parts.pictures(), description)


def open_reference(file: ReferenceFile, directory: epath.Path, extractor: FeatureExtractor, part: int) -> Reference:
    """Computes the features of a reference file's pictures, in parts in `directory`; without statistics in the file,
    they are those of its pictures, as in ADM's evaluator."""
    if file.pictures is None:
        return Reference(file.pool, file.spatial)
    source = open_samples(str(file.path), part, None)
    settings = {"reference": file.sha256, "inception": extractor.weights.sha256}
    nothing = np.zeros(source.shape[0], bool)
    parts = Parts.open(resolve_path(directory), settings, part=part, kept=nothing, picture=source.shape[1:])
    parts.fill(source.read, extractor, f"reference {file.path.name}")
    hosts.wait_for_all("the reference is read")
    if file.pool is not None:
        return Reference(file.pool, file.spatial, parts.pool)
    statistics = Statistics()
    for features in parts.features():
        statistics.add(features)
    return Reference(statistics.pool, statistics.spatial, parts.pool)
