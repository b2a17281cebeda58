"""Encoding a source's records, once, into what training reads; for `lattejax.encode`.

The records of a split are divided into shards. Of n workers, each encodes every n-th shard independently: workers share
only the directory, and the last one to finish writes the manifest. A shard's contents depend only on config and source,
so a killed worker resumes with the shard that it was encoding. If the source has grown, its new records become new
shards; if texts have been corrected, the shards that have them get new texts, and keep their latents.
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from lattejax.configuration import Config
from lattejax.data.prompts import PromptEncoder
from lattejax.data.stored import ENCODING, LATENTS, MANIFEST, SUMMARY
from lattejax.encoding.items import Item
from lattejax.encoding.order import ORDER, Order, divide, extended, first_order
from lattejax.encoding.prepare import digests_alone, find_encoder, limits_of, make_preparation
from lattejax.encoding.settings import check_same, settings_of
from lattejax.encoding.shards import Encoder, ShardWriter, prepare_all
from lattejax.encoding.sources import Records, open_records
from lattejax.encoding.summary import is_summarized, write_summary
from lattejax.encoding.written import (
    File,
    Survey,
    Written,
    check_left_out,
    check_shard,
    count_left_out,
    finish,
    plan_files,
    read_descriptions,
)
from lattejax.errors import UserError
from lattejax.files import check_writable, is_remote, read_json, resolve_path, write_atomically
from lattejax.leases import one_writer
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.functional import Params
from lattejax.parallel.mesh import make_mesh
from lattejax.weights.autoencoders import StoredAutoencoder


def encode(config: Config, out: epath.PathLike, worker: int = 0, workers: int = 1) -> bool:
    """Encodes the config's pictures and texts into the directory `out`, or resumes an interrupted encoding.

    Args:
      config: defines the source and the autoencoder.
      out: the directory.
      worker: the index of this worker.
      workers: the number of processes that encode into the same directory, on one host or several.

    Returns:
      Whether everything is encoded, by this worker and the others.

    Raises:
      UserError: source or autoencoder do not match the config, more records than allowed are left out, `out` holds
        other latents, or one of its files has changed since it was written.
    """
    out = resolve_path(out)
    if is_remote(out):
        raise UserError(f"--out={out} is remote; latents are written to a local disk or a mount")
    stored = StoredAutoencoder.open_for(config.data)
    source, encoder = open_records(config.images), find_encoder(config)
    check_writable(out / ENCODING, f"--out={out}")
    settings = settings_of(config, stored, source)
    with one_writer(out / f".worker-{worker}", f"--out={out}, by worker {worker},"):
        if (out / ENCODING).exists():
            check_same(out, settings, source.version)
        order, files = _plan(out, config, source)
        _begin(out, settings, order)
        job = Job(config, out, source, order, stored, encoder)
        return job.run(files, worker, workers, settings)


def _plan(out: epath.Path, config: Config, source: Records) -> tuple[Order, list[File]]:
    """The order of the records, with those that are new, and all shards."""
    if (out / ORDER).exists():
        known = Order.load(out / ORDER)
        encoded = functools.partial(_encoded, out, config, source, known)
        order = extended(known, source.sizes, source.names, config.images.name, encoded)
    else:
        order = first_order(source.sizes, source.names)
    return order, _files(order, config, source)


def _files(order: Order, config: Config, source: Records) -> list[File]:
    splits = {"train": config.images.train, "test": config.images.test}
    return plan_files(divide(order, splits, 1 if source.names_are_shards else config.images.shard_pictures))


def _encoded(out: epath.Path, config: Config, source: Records, order: Order) -> set[str]:
    """The names of the records that have been encoded, and not left out."""
    return {
        name
        for file, one in read_descriptions(out, _files(order, config, source)).items()
        for name in order.names[file.part.records.start : file.part.records.stop]
        if not one.leaves_out(name)
    }


def _begin(out: epath.Path, settings: dict[str, Any], order: Order) -> None:
    """Initializes the directory for this encoding, or brings it to its source's present name; and records the order."""
    is_new = not (out / ENCODING).exists()
    if is_new and any(not file.name.startswith((ENCODING, ORDER, ".worker-")) for file in out.iterdir()):
        raise UserError(f"--out={out} is not a directory of latents, and not empty; choose another")
    if is_new or read_json(out / ENCODING)["source"] != settings["source"]:
        write_atomically(out / ENCODING, (json.dumps(settings, indent=2) + "\n").encode())
    if not (out / ORDER).exists() or Order.load(out / ORDER) != order:
        order.save(out / ORDER)


class Job:
    """One worker's part of an encoding."""

    def __init__(
        self,
        config: Config,
        out: epath.Path,
        source: Records,
        order: Order,
        stored: StoredAutoencoder,
        encoder: PromptEncoder | None,
    ):
        self.config, self.out, self.source, self.order = config, out, source, order
        self.stored, self.prompt_encoder = stored, encoder
        self.version = source.version  # before records are read: what changes meanwhile is noticed the next time

    @functools.cached_property
    def limits(self) -> str:
        return limits_of(self.config, self.prompt_encoder)

    @functools.cached_property
    def encoder(self) -> Encoder:
        return make_encoder(self.stored, self.config.images.batch_size)

    def run(self, files: list[File], worker: int, workers: int, settings: dict[str, Any]) -> bool:
        """Encodes this worker's shards, or updates them; returns whether all workers' are complete."""
        most, out = self.config.images.most_unreadable, self.out
        written = read_descriptions(out, files)
        if count_left_out(written) > most:  # they may have been repaired since
            written = {file: one for file, one in written.items() if not one.shard.left_out}
        ours = files[worker::workers]
        tasks = {file: self._task(file, written.get(file)) for file in ours}
        tasks = {file: task for file, task in tasks.items() if task}
        if tasks:
            for file in (MANIFEST, SUMMARY):
                (out / file).unlink(missing_ok=True)
        with _progress_bar(None if self.source.names_are_shards else _count(tasks)) as bar:
            for file, task in tasks.items():
                known = written[file] if task == "texts" else None
                written[file] = self._write(file, known, bar)
                check_left_out(written, most)
        written = read_descriptions(out, files)
        check_left_out(written, most)
        if len(written) < len(files) or any(self._difference(file, written[file]) for file in set(files) - set(ours)):
            return False  # the other workers' part, or they have not seen yet that the source has changed
        if finish(out, settings, self.config.data.latent_shape, written) or not is_summarized(out, self.config):
            write_summary(out, self.config, written, self.stored, self.prompt_encoder)
        return True

    def _items(self, file: File) -> Iterator[Item]:
        records = file.part.records
        names = () if self.order.names is None else self.order.names[records.start : records.stop]
        return self.source.read(file.part, [name for name in names if name])

    def _task(self, file: File, known: Written | None) -> str:
        """What is to be done for a shard: "all", "texts" or nothing."""
        if known is None:
            return "all"
        check_shard(self.out, known)
        task = self._difference(file, known)
        if not task and known.version != self.version:
            known.stamped(file, self.version).save(self.out, file)
        return task

    def _difference(self, file: File, known: Written) -> str:
        """What of a shard does not fit the source and the limits as they are now, as in `_task`."""
        if known.shard.left_out and known.limits not in ("", self.limits):
            return "all"
        if known.version == self.version:
            return ""
        found = self._survey(file)
        if found["pictures"] != known.pictures:
            return "all"
        return "texts" if found["texts"] != known.texts or found["contents"] != known.contents else ""

    def _survey(self, file: File) -> dict[str, str]:
        """The hashes of what the source has now, see `Written`; pictures are read, not decoded."""
        survey, threads = Survey(), self.config.images.threads
        with ThreadPoolExecutor(threads) as pool:
            for one in prepare_all(self._items(file), digests_alone, pool, threads):
                survey.see(one.item, one.digests)
        return survey.hashes

    def _write(self, file: File, known: Written | None, bar: tqdm) -> Written:
        """Writes a shard, or only its texts if it is known and its latents fit."""
        settings = self.config.images
        prepare = make_preparation(self.config, self.prompt_encoder, texts_only=known is not None)
        writer = ShardWriter(self.out, file.name, self.config, known)
        try:
            with ThreadPoolExecutor(settings.threads) as pool:
                ahead = max(2 * settings.batch_size, settings.threads)
                prepared = prepare_all(self._items(file), prepare, pool, ahead)
                one = writer.write(_counted(prepared, bar), None if known else self.encoder)
        except BaseException:
            writer.discard()
            raise
        if one is None:
            bar.write(f"{file.name}: its pictures have changed, so their latents are computed again")
            return self._write(file, None, bar)
        one = one.stamped(file, self.version, limits=self.limits if writer.too_long else "")
        one.save(self.out, file)
        _report(bar, file, one, "texts of " if known else "")
        return one


def _count(files: Any) -> int:
    return sum(len(file.part.records) for file in files)


def _counted(prepared: Iterator[Any], bar: tqdm) -> Iterator[Any]:
    for one in prepared:
        bar.update()
        yield one


# ---- The autoencoder


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


# ---- Progress


@contextlib.contextmanager
def _progress_bar(total: int | None) -> Iterator[tqdm]:
    """A progress bar with records/s and the remaining time; without a terminal it counts invisibly."""
    with open(os.devnull, "w") as nowhere:
        file = sys.stderr if sys.stderr.isatty() else nowhere
        with tqdm(total=total, unit="image", file=file, dynamic_ncols=True) as bar:
            yield bar


def _report(bar: tqdm, file: File, one: Written, what: str) -> None:
    """Prints a shard's skipped records and its numbers, and this worker's progress."""
    for problem in one.shard.left_out:
        bar.write(f"skipped: {problem}")
    rate = bar.n / max(bar.format_dict["elapsed"], 1e-9)
    progress = f"{bar.n:,}" + (f" of {bar.total:,}" if bar.total else "")
    if bar.total and bar.n:  # none yet where all of a shard's records have been removed
        progress += f", {tqdm.format_interval((bar.total - bar.n) / rate)} left"
    records = one.shard.files[LATENTS].records
    bar.write(f"{what}{file.name}: {records:,} latents; {progress}, {rate:.1f} images/s")
