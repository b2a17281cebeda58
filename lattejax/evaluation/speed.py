"""How fast things are, beside the limit that the machine sets, measured in the same run."""

import itertools
import tempfile
import time
from typing import Any

import numpy as np
from etils import epath

from lattejax.configuration import Config
from lattejax.data import latents
from lattejax.data.examples import image_batcher
from lattejax.data.latents import LatentDrawings, Shard
from lattejax.data.pipeline import training_batches
from lattejax.data.prompts import PromptEncoder

CAPTIONS = tuple(f"number {i}" for i in range(1000))
REPEATS = 7


def data_rate(config: Config, encoder: PromptEncoder, num_records: int) -> dict[str, Any]:
    """How many latents a second the loader alone delivers, as training reads them, after warm-up.

    Random latents of the config's shape are written in the real format, in ten files, and read back in the config's
    batches with its threads, shuffled. The limit is the rate at which the same records can be read as bytes, so many at
    a time and in the same disorder, but not decoded, shuffled or put together. Both are medians over repeats that
    alternate.
    """
    data, batch_size = config.data, config.train.batch_size
    with tempfile.TemporaryDirectory() as path:
        drawings = _write(epath.Path(path), data.latent_shape, num_records)
        batches = training_batches(
            drawings,
            image_batcher(config, encoder, CAPTIONS),
            batch_size=batch_size,
            seed=config.seed,
            threads=data.threads,
        )
        rng, ours, limits = np.random.default_rng(0), [], []
        steps = max(2, num_records // batch_size)
        for _ in range(REPEATS):
            list(itertools.islice(batches, 2 * data.threads + 1))  # what has been read ahead
            started = time.perf_counter()
            list(itertools.islice(batches, steps))
            ours.append(time.perf_counter() - started)
            chosen = [rng.integers(num_records, size=batch_size).tolist() for _ in range(steps)]
            time.sleep(0.5)  # until reading ahead has ended
            started = time.perf_counter()
            for numbers in chosen:
                drawings.records.__getitems__(numbers)
            limits.append(time.perf_counter() - started)
    rate, limit = (steps * batch_size / float(np.median(seconds[1:])) for seconds in (ours, limits))
    return {
        "seconds": batch_size / rate,
        "latents_per_second": rate,
        "limit": limit,
        "share_of_limit": rate / limit,
        "batch_size": batch_size,
        "megabytes_per_second": rate * 4 * int(np.prod(data.latent_shape)) / 1e6,
    }


def _write(directory: epath.Path, latent_shape: tuple[int, int, int], num_records: int) -> LatentDrawings:
    rng, shards = np.random.default_rng(0), []
    files = latents.files({"train": num_records, "test": 0}, -(-num_records // 10))
    for file in files:
        records = (
            {
                "latents": rng.standard_normal(latent_shape, np.float32),
                "caption": CAPTIONS[i % len(CAPTIONS)],
                "picture": str(i),
            }
            for i in file.pictures
        )
        count = latents.write_records(directory / file.name, latent_shape, records)
        shards.append(Shard(file.name, count, (directory / file.name).stat().length, "", []))
    latents.write_metadata(directory, latent_shape, {"train": shards})
    return LatentDrawings(directory, "train", latent_shape)
