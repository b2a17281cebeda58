"""The files of ADM's evaluator (github.com/openai/guided-diffusion, evaluations/), read and written.

Sample file     npz with `arr_0`, uint8 [N, H, W, 3]
Reference file  npz with `mu`, `sigma` (of pool_3), `mu_s`, `sigma_s` (of mixed_6/conv), and `arr_0`, pictures for
                precision and recall; ours also says in `description` how it was made, which that evaluator ignores

Pictures are read and written a block at a time: a file may be larger than memory.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from lattejax.errors import UserError, parsing
from lattejax.evaluation.frechet import Gaussian
from lattejax.evaluation.precision_recall import NEIGHBOURS
from lattejax.files import check_file, resolve_path, writing
from lattejax.models.inception import POOL, SPATIAL

PICTURES = "arr_0"
STATISTICS = {"pool": ("mu", "sigma", POOL), "spatial": ("mu_s", "sigma_s", SPATIAL)}
DESCRIPTION = "description"
BLOCK = 1000  # pictures
FEWEST = NEIGHBOURS + 1  # pictures in a reference


@dataclasses.dataclass(frozen=True)
class SampleFile:
    """The pictures of a sample file or a reference file, opened for reading."""

    path: epath.Path
    shape: tuple[int, int, int, int]

    @classmethod
    def open(cls, path: str) -> "SampleFile":
        """Raises `UserError` unless it is an npz whose `arr_0` is uint8 [N, H, W, 3]."""
        file = resolve_path(path)
        check_file(file, math.inf)
        with parsing(f"the sample file {path}"), _array(file, PICTURES) as (_, shape, dtype):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                raise UserError(f"{path} has {PICTURES} of {dtype} {list(shape)}; expected uint8 [N, H, W, 3]")
            return cls(file, tuple(shape))

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self, size: int = BLOCK) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """Reads the pictures in their order."""
        count, *picture = self.shape
        with parsing(f"the sample file {self.path}"), _array(self.path, PICTURES) as (file, _, _):
            for start in range(0, count, size):
                rows = min(size, count - start)
                data = file.read(rows * math.prod(picture))
                yield np.frombuffer(data, np.uint8).reshape(rows, *picture)


@contextlib.contextmanager
def _array(path: epath.Path, name: str) -> Iterator[tuple[Any, tuple[int, ...], np.dtype]]:
    """Opens an array of an npz: a file whose position is at its data, its shape and its dtype."""
    with path.open("rb") as opened, zipfile.ZipFile(opened) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise UserError(f"{path} has no {name}; it has {', '.join(archive.namelist()) or 'nothing'}")
        with archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, is_fortran, dtype = read(file)
            if is_fortran and len(shape) > 1:
                raise UserError(f"{path} has {name} in Fortran's order; save it in C's")
            yield file, shape, dtype


def write_samples(path: epath.Path, shape: tuple[int, ...], blocks: Iterable[np.ndarray], **others: np.ndarray) -> None:
    """Writes a file of pictures of this complete shape, and of other arrays; a killed process leaves none.

    Equal arrays give equal bytes.
    """
    with writing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in others.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        with archive.open(zipfile.ZipInfo(f"{PICTURES}.npy"), "w", force_zip64=True) as member:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            written = 0
            for block in blocks:
                member.write(np.ascontiguousarray(block, np.uint8).data)
                written += len(block)
        if written != shape[0]:
            raise ValueError(f"{written} pictures were written, not {shape[0]}")


# ---- Reference files


@dataclasses.dataclass(frozen=True)
class ReferenceFile:
    """What a reference file has; an absent part is None."""

    path: epath.Path
    sha256: str
    pool: Gaussian | None
    spatial: Gaussian | None
    pictures: SampleFile | None
    description: dict[str, Any]

    @property
    def is_pytorch_fids(self) -> bool:
        """Whether it has what pytorch-fid writes, which resizes pictures in another way than ADM's evaluator."""
        return self.spatial is None and self.pictures is None and not self.description

    @classmethod
    def open(cls, path: str) -> "ReferenceFile":
        """Reads everything but the pictures.

        Raises:
          UserError: it is no npz, or has neither statistics nor pictures, or they have another shape, or the pictures
            are fewer than `FEWEST`.
        """
        file = resolve_path(path)
        check_file(file, math.inf)
        with parsing(f"the reference file {path}"), file.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as arrays:
                names = set(arrays.files)
                gaussians = {
                    kind: _gaussian(arrays[mean], arrays[covariance], size, f"{path}: {mean} and {covariance}")
                    for kind, (mean, covariance, size) in STATISTICS.items()
                    if {mean, covariance} <= names
                }
                description = dict(json.loads(str(arrays[DESCRIPTION]))) if DESCRIPTION in names else {}
        pictures = SampleFile.open(path) if PICTURES in names else None
        if pictures is not None and len(pictures) < FEWEST:
            raise UserError(
                f"{path} has {len(pictures)} pictures ({PICTURES}); precision and recall need at least {FEWEST} in a "
                "reference"
            )
        if "pool" not in gaussians and pictures is None:
            raise UserError(f"{path} has neither mu and sigma nor {PICTURES}; it has {', '.join(sorted(names))}")
        return cls(file, sha256, gaussians.get("pool"), gaussians.get("spatial"), pictures, description)


def _gaussian(mean: np.ndarray, covariance: np.ndarray, size: int, name: str) -> Gaussian:
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise UserError(f"{name} have the shapes {mean.shape} and {covariance.shape}, not {(size,)} and {(size, size)}")
    gaussian = Gaussian(mean.astype(np.float64), covariance.astype(np.float64))
    if not (np.isfinite(gaussian.mean).all() and np.isfinite(gaussian.covariance).all()):
        raise UserError(f"{name} have values that are not finite")
    try:
        _ = gaussian.factor  # which every distance needs
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return gaussian


def write_reference(
    path: epath.Path,
    pool: Gaussian,
    spatial: Gaussian,
    shape: tuple[int, ...],
    pictures: Iterable[np.ndarray],
    description: dict[str, Any],
) -> None:
    """Writes a reference file, with pictures of this complete shape."""
    arrays = {DESCRIPTION: np.asarray(json.dumps(description))}
    for kind, gaussian in (("pool", pool), ("spatial", spatial)):
        mean, covariance, _ = STATISTICS[kind]
        arrays |= {mean: gaussian.mean, covariance: gaussian.covariance}
    write_samples(path, shape, pictures, **arrays)
