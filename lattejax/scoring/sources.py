"""Where pictures to judge, or to compare with, come from: a folder, a sample file, latents, a run's own data."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from lattejax.data.examples import Drawings
from lattejax.data.images import CROP, open_image, square
from lattejax.data.latents import LatentSource
from lattejax.data.manifest import Manifest
from lattejax.data.stored import MANIFEST, SPLITS
from lattejax.errors import UserError, parsing
from lattejax.evaluation.adm import SampleFile
from lattejax.files import is_remote, resolve_path
from lattejax.runs.data import open_data
from lattejax.runs.run import Run
from lattejax.sampling.images import decode_images
from lattejax.scoring.parts import ReadPictures
from lattejax.weights.autoencoders import StoredAutoencoder

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
QUANTISATION = "clip(127.5 x + 128, 0, 255), rounded down"  # of `decode_images`, as it is recorded
AT_A_TIME = 64  # latents that are decoded


@dataclasses.dataclass(frozen=True, eq=False)
class PictureSource:
    """Pictures of one size. `read` is called with increasing indices, and may read on from the last ones."""

    shape: tuple[int, int, int, int]
    read: ReadPictures
    identity: str  # a hash of what determines the pictures
    preprocessing: str
    version: str = ""  # which of several with this identity, for as long as they are read


def open_samples(path: str, part: int, num: int | None) -> PictureSource:
    """The first `num` pictures of a sample file, or all.

    Raises:
      UserError: it is none, or has fewer.
    """
    file = SampleFile.open(path)
    if num is not None and num > len(file):
        raise UserError(f"--num={num}, but {path} has {len(file):,} pictures")
    with file.path.open("rb") as opened:
        identity = hashlib.file_digest(opened, "sha256").hexdigest()
    total, stream = num or len(file), file.blocks(part)
    blocks = enumerate(stream)

    def read(rows: Int[np.ndarray, "n"]) -> UInt8[np.ndarray, "n H W 3"]:
        pictures = next(block for index, block in blocks if index == rows[0] // part)[: len(rows)]
        if rows[-1] == total - 1:
            stream.close()  # and the file
        return pictures

    return PictureSource((total, *file.shape[1:]), read, identity, "none: the file's pictures as they are")


def open_folder(path: str, size: int) -> PictureSource:
    """All pictures of a folder and those below it, in the order of their paths, cropped to squares.

    Raises:
      UserError: there are none.
    """
    directory = resolve_path(path)
    files = sorted(file for file in _files(directory) if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{path} has no pictures; a picture is a file {', '.join(SUFFIXES)}")
    names = [f"{file.relative_to(directory)} {file.stat().length}" for file in files]
    identity, version = (
        hashlib.sha256("\n".join(lines).encode()).hexdigest()
        for lines in ([str(size), *names], [str(_modified(file)) for file in files])
    )

    def read(rows: Int[np.ndarray, "n"]) -> UInt8[np.ndarray, "n H W 3"]:
        return np.stack([_cropped(files[row], size) for row in rows])

    return PictureSource((len(files), size, size, 3), read, identity, f"{CROP} to {size} pixels", version)


def _cropped(file: epath.Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    with parsing(f"the image {file}"):
        return square(open_image(file), size)


def _modified(file: epath.Path) -> int:
    return int(file.stat().mtime) if is_remote(file) else os.stat(file).st_mtime_ns


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for each in directory.iterdir():
        if each.is_dir():
            yield from _files(each)
        else:
            yield each


def open_latents(path: str, split: str, autoencoder: str) -> PictureSource:
    """The pictures that the latents of a split are decoded to; without mirrored copies.

    Raises:
      UserError: they are incomplete, or of another autoencoder.
    """
    directory = resolve_path(path)
    manifest, source = Manifest.read(directory / MANIFEST), LatentSource.at(directory)
    stored = StoredAutoencoder.open(autoencoder, source.latent_shape[2])
    manifest.made_by.check(stored.identity, path, autoencoder)
    identity = f"{source.identities[0]} {split}"
    return _decoded(source.drawings(split), manifest.views, stored, manifest.made["image_size"], identity, path)


def open_run_data(run: Run, split: str, autoencoder: str = "") -> PictureSource:
    """The same of a run's own data, with its autoencoder; for `autoencoder` see `Run.open_autoencoder`."""
    source = open_data(run.config, autoencoder)
    drawings, views = source.drawings(split, run.encoder), getattr(source, "views", 1)
    identity = f"{source.identities[0]} {split}"
    stored = run.open_autoencoder(autoencoder)
    return _decoded(drawings, views, stored, run.config.data.image_size, identity, str(run.workdir.path))


def _decoded(
    drawings: Drawings, views: int, stored: StoredAutoencoder, side: int, identity: str, name: str
) -> PictureSource:
    if not len(drawings):
        raise UserError(f"{name} has no pictures")
    decoder = stored.weights("decoder")

    def read(rows: Int[np.ndarray, "n"]) -> UInt8[np.ndarray, "n H W 3"]:
        images = []
        for start in range(0, len(rows), AT_A_TIME):
            indices = (views * rows[start : start + AT_A_TIME]).tolist()
            with parsing(f"the latents of {name}"):
                latents = [drawing.latents for drawing in drawings.__getitems__(indices)]
            padded = np.stack(latents + latents[:1] * (AT_A_TIME - len(latents)))  # one shape: compiled once
            images.append(np.asarray(decode_images(stored.autoencoder, decoder, padded))[: len(latents)])
        return np.concatenate(images)

    preprocessing = f"decoded from latents of {stored.identity.sha256[:16]}; {QUANTISATION}"
    return PictureSource((len(drawings) // views, side, side, 3), read, identity, preprocessing)


def open_reference_source(
    path: str,
    *,
    workdir: str | None = None,
    split: str | None = None,
    autoencoder: str | None = None,
    size: int | None = None,
    part: int,
) -> PictureSource:
    """What reference statistics are made of: a run's own data if `path` is "data", otherwise what lies at `path`.

    Args:
      path: "data", a folder of pictures, latents, or an .npz of samples.
      workdir: the run, of "data" alone.
      split: that of the data or the latents; None: "train".
      autoencoder: where that of the data or the latents is.
      size: the side of squares that a folder's pictures are cropped to.
      part: pictures that are read at a time.

    Raises:
      UserError: it is nothing of these, or a flag that it needs is missing, or has no effect.
    """
    flags = {"workdir": workdir, "split": split, "autoencoder": autoencoder, "image_size": size}

    def check(what: str, used: Sequence[str]) -> None:
        if others := [name for name, value in flags.items() if value is not None and name not in used]:
            raise UserError(f"--{others[0]} has no effect on {what} (--make_reference={path}); leave it out")

    split = split or "train"
    if path == "data":
        check("the data of a run", ("workdir", "split", "autoencoder"))
        if workdir is None:
            raise UserError("--make_reference=data is a run's own data; add its --workdir")
        return open_run_data(Run.open(workdir), split, autoencoder or "")
    place = resolve_path(path)
    if path.endswith(".npz"):
        check("an .npz", ())
        return open_samples(path, part, None)
    if (place / MANIFEST).is_file():
        check("latents", ("split", "autoencoder"))
        if autoencoder is None:
            raise UserError(f"{path} has latents; add --autoencoder, which they were encoded with")
        return open_latents(path, split, autoencoder)
    if not place.is_dir():
        raise UserError(f"--make_reference={path} is no folder of pictures, no latents and no .npz of samples")
    check("a folder of pictures", ("image_size",))
    if size is None:
        raise UserError(f"{path} is a folder of pictures; add --image_size, to which they are cropped")
    return open_folder(path, size)


__all__ = ["SPLITS", "PictureSource", "open_reference_source", "open_samples"]
