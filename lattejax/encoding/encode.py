"""Encoding pictures into latents, for `lattejax.encode`.

The pictures of a split are split into shards, one file each. Of n workers, each encodes every n-th shard independently:
workers share only the directory, and the last one to finish writes the manifest. A shard's contents depend only on the
config, so a killed worker resumes with the shard that it was encoding.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath, epy
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from lattejax.configuration import Config
from lattejax.data import images, latents
from lattejax.data.latents import CROP, ENCODING, MANIFEST, MOST_CAPTIONS, SPLITS, Encoding, File, Shard
from lattejax.encoding.pictures import Pictures, check_disjoint, open_pictures
from lattejax.encoding.written import (
    Written,
    check_shard,
    check_unreadable,
    count_unreadable,
    description,
    finish,
    hash_file,
    read_descriptions,
)
from lattejax.errors import UserError
from lattejax.files import check_writable, is_remote, read_json, resolve_path, write_atomically
from lattejax.leases import one_writer
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.functional import Params
from lattejax.parallel.mesh import make_mesh
from lattejax.weights.autoencoders import StoredAutoencoder

with epy.lazy_imports():
    import grain


def encode(config: Config, out: epath.PathLike, worker: int = 0, workers: int = 1) -> bool:
    """Encodes the config's pictures into the directory `out`, or resumes an interrupted encoding.

    Args:
      config: defines the pictures and the autoencoder.
      out: the directory.
      worker: the index of this worker.
      workers: the number of processes that encode into the same directory, on one host or several.

    Returns:
      Whether everything is encoded, by this worker and the others.

    Raises:
      UserError: pictures, captions or autoencoder do not match the config, more pictures than allowed are unreadable,
        `out` holds other latents, or one of its files has changed since it was written.
    """
    out = resolve_path(out)
    if is_remote(out):
        raise UserError(f"--out={out} is remote; latents are written to a local disk or a mount")
    stored = StoredAutoencoder.open_for(config.data)
    pictures = {split: open_pictures(config.images, split) for split in SPLITS}
    check_disjoint(**pictures)
    encoding = _encoding(config, stored, pictures)
    check_writable(out / ENCODING, f"--out={out}")
    with one_writer(out / f".worker-{worker}", f"--out={out}, by worker {worker},"):
        return _encode_all(config, out, worker, workers, stored, pictures, encoding)


def _encode_all(
    config: Config,
    out: epath.Path,
    worker: int,
    workers: int,
    stored: StoredAutoencoder,
    pictures: dict[str, Pictures],
    encoding: Encoding,
) -> bool:
    most_unreadable = config.images.most_unreadable
    _begin(out, encoding)
    files = latents.files(encoding.pictures, encoding.shard_pictures)
    written = read_descriptions(out, files)
    if count_unreadable(written) > most_unreadable:  # they may have been repaired since
        written = {file: one for file, one in written.items() if not one.shard.unreadable}
    missing = []
    for file in files[worker::workers]:
        if file in written:
            check_shard(out, written[file].shard)
        else:
            missing.append(file)
    if missing:
        (out / MANIFEST).unlink(missing_ok=True)
        encoder = make_encoder(stored, config.images.batch_size)
    with _progress_bar(sum(len(file.pictures) for file in missing)) as bar:
        for file in missing:
            written[file] = _write_shard(out, config, pictures[file.split], file, encoder, bar)
            _report(bar, written[file].shard)
            check_unreadable(written, most_unreadable)
    written = read_descriptions(out, files)
    check_unreadable(written, most_unreadable)
    if len(written) < len(files):
        return False
    finish(out, encoding, written)
    return True


def _encoding(config: Config, stored: StoredAutoencoder, pictures: dict[str, Pictures]) -> Encoding:
    return Encoding(
        autoencoder=stored.identity,
        image_size=config.data.image_size,
        latent_shape=config.data.latent_shape,
        crop=CROP,
        flip=config.images.flip,
        images={split: of_split.identity for split, of_split in pictures.items()},
        pictures={split: len(of_split) for split, of_split in pictures.items()},
        shard_pictures=config.images.shard_pictures,
    )


def _begin(out: epath.Path, encoding: Encoding) -> None:
    """Initializes the directory for this encoding, or confirms that it belongs to this encoding."""
    values = encoding.as_json()
    if not (out / ENCODING).exists():
        if out.exists() and any(not file.name.startswith((ENCODING, ".worker-")) for file in out.iterdir()):
            raise UserError(f"--out={out} is not a directory of latents, and not empty; choose another")
        write_atomically(out / ENCODING, (json.dumps(values, indent=2) + "\n").encode())
    theirs = read_json(out / ENCODING)
    different = [f"{key}: {theirs.get(key)} -> {values[key]}" for key in values if theirs.get(key) != values[key]]
    if different:
        raise UserError(f"--out={out} holds other latents ({'; '.join(different)}); choose another")


# ---- One file


class Cropped(NamedTuple):
    """A picture ready to be encoded, or the reason why it is skipped."""

    name: str
    caption: str
    pixels: UInt8[np.ndarray, "S S 3"] | None
    problem: str


Encoder = Callable[[UInt8[np.ndarray, "B S S 3"]], Float[jax.Array, "B h w C"]]


def make_encoder(stored: StoredAutoencoder, batch_size: int) -> Encoder:
    """Returns the encoder, compiled for batches of pictures that are sharded over this process's devices.

    Raises:
      UserError: the devices do not divide the batch.
    """
    mesh = make_mesh({"data": -1}, jax.local_devices())
    if batch_size % mesh.size:
        raise UserError(f"config.images.batch_size={batch_size} must be a multiple of this host's {mesh.size} devices")
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    weights = jax.device_put(stored.weights("encoder"), everywhere)
    return lambda pixels: encode_pixels(stored.autoencoder, weights, jax.device_put(pixels, rows))


@functools.partial(jax.jit, static_argnames="autoencoder")
def encode_pixels(
    autoencoder: Autoencoder, encoder: Params, pixels: UInt8[Array, "B S S 3"]
) -> Float[Array, "B h w C"]:
    """Computes latents in full float32 precision, even if a device's default is lower: they are reused for long."""
    with jax.default_matmul_precision("float32"):
        return autoencoder.encode(encoder, pixels.astype(jnp.float32) / 127.5 - 1)


def _write_shard(
    out: epath.Path, config: Config, pictures: Pictures, file: File, encoder: Encoder, bar: tqdm
) -> Written:
    """Encodes pictures into a file, and then writes the file that describes it."""
    settings, unreadable, captions = config.images, [], set()

    def readable() -> Iterator[Cropped]:
        for cropped in _crop(config, pictures, file.pictures):
            bar.update()
            if cropped.pixels is None:
                unreadable.append(cropped.problem)
            else:
                captions.add(cropped.caption)
                yield cropped

    partial, complete = out / f"{file.name}.partial-{secrets.token_hex(4)}", out / file.name
    encoded = _encode(readable(), settings.batch_size, settings.flip, encoder)
    records, contents = latents.write_records(
        partial,
        config.data.latent_shape,
        ({"latents": latent, "caption": cropped.caption, "picture": cropped.name} for cropped, latent in encoded),
    )
    partial.replace(complete)
    shard = Shard(file.name, records, complete.stat().length, hash_file(complete), unreadable, contents)
    written = Written(shard, sorted(captions) if len(captions) <= MOST_CAPTIONS else None)
    values = {"shard": dataclasses.asdict(shard), "captions": written.captions}
    write_atomically(description(out, file), (json.dumps(values) + "\n").encode())
    for left in out.glob(f"{file.name}.partial-*"):  # from killed workers
        left.unlink()
    return written


def _crop(config: Config, pictures: Pictures, indices: range) -> Iterator[Cropped]:
    """Reads and crops pictures in threads, and yields them in order."""

    def crop(index: int) -> Cropped:
        picture = pictures[index]
        pixels = None if picture.image is None else images.square(picture.image, config.data.image_size)
        return Cropped(picture.name, picture.caption, pixels, picture.problem)

    settings = config.images
    ahead = max(2 * settings.batch_size, settings.threads)
    options = grain.ReadOptions(num_threads=settings.threads, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.source(indices).map(crop).to_iter_dataset(options))


def _encode(
    pictures: Iterator[Cropped], batch_size: int, flip: bool, encoder: Encoder
) -> Iterator[tuple[Cropped, Float[np.ndarray, "h w C"]]]:
    """Yields each picture with its latents, and with `flip` again with the latents of its mirror image.

    The device works on one batch while the previous one is written and the next one is read.
    """
    waiting = iter(())
    while batch := list(itertools.islice(pictures, batch_size)):
        pixels = np.stack([picture.pixels for picture in batch])
        pixels = np.pad(pixels, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
        views = [encoder(view) for view in ((pixels, pixels[:, :, ::-1]) if flip else (pixels,))]
        yield from waiting
        waiting = _fetch(batch, views)
    yield from waiting


def _fetch(
    batch: list[Cropped], views: list[Float[jax.Array, "B h w C"]]
) -> Iterator[tuple[Cropped, Float[np.ndarray, "h w C"]]]:
    views = jax.device_get(views)
    for i, picture in enumerate(batch):
        for view in views:
            yield picture, view[i]


# ---- Progress


@contextlib.contextmanager
def _progress_bar(total: int) -> Iterator[tqdm]:
    """A progress bar with images/s and the remaining time; without a terminal it counts invisibly."""
    with open(os.devnull, "w") as nowhere:
        file = sys.stderr if sys.stderr.isatty() else nowhere
        with tqdm(total=total, unit="image", file=file, dynamic_ncols=True) as bar:
            yield bar


def _report(bar: tqdm, shard: Shard) -> None:
    """Prints a file's skipped pictures and records, and this worker's progress."""
    for problem in shard.unreadable:
        bar.write(f"skipped: {problem}")
    rate = bar.n / max(bar.format_dict["elapsed"], 1e-9)
    left = tqdm.format_interval((bar.total - bar.n) / rate)
    bar.write(f"{shard.file}: {shard.records:,} records; {bar.n:,} of {bar.total:,}, {rate:.1f} images/s, {left} left")
