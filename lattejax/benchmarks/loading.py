"""How fast the loader delivers latents, beside the limit that the files set, measured in the same run."""

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
from lattejax.data.pipeline import Batches
from lattejax.data.prompts import PromptEncoder

NUM_CAPTIONS = 1000  # where contexts are shared
WORDS = ("a", "red", "blue", "bicycle", "against", "the", "wall", "wooden", "soup", "from", "above", "dog", "photo")
REPEATS = 7


def data_rate(config: Config, encoder: PromptEncoder, num_records: int) -> dict[str, Any]:
    """How many latents a second the loader alone delivers, as training reads them, after warm-up.

    Random latents of the config's shape are written in the real format, in ten files, and read back in the config's
    batches with its threads, shuffled: with the numbers of 1,000 captions where contexts are shared, and otherwise each
    with a caption of its own, of twenty words, which is made into a prompt. The limit is set by the rate at which the
    same records can be read as bytes, so many at a time and in the same disorder, but not decoded, shuffled or put
    together. Both are medians over repeats that alternate; `seconds` and `limit` are a batch's.
    """
    data, batch_size = config.data, config.train.batch_size
    with tempfile.TemporaryDirectory() as path:
        captions = make_captions(NUM_CAPTIONS if config.train.share_contexts else num_records)
        drawings = _write(epath.Path(path), data.latent_shape, num_records, captions)
        batches = Batches(
            drawings,
            image_batcher(config, encoder, captions),
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
        "limit": batch_size / limit,
        "share_of_limit": rate / limit,
        "latents_per_second": rate,
        "records_per_second": limit,
        "batch_size": batch_size,
        "megabytes_per_second": rate * 4 * int(np.prod(data.latent_shape)) / 1e6,
    }


def make_captions(count: int) -> list[str]:
    """So many captions of twenty words and a number, all different."""
    rng = np.random.default_rng(0)
    return [f"{' '.join(rng.choice(WORDS, 20))} {number}" for number in range(count)]


def _write(
    directory: epath.Path, latent_shape: tuple[int, int, int], num_records: int, captions: list[str]
) -> LatentDrawings:
    rng, shards = np.random.default_rng(0), []
    files = latents.files({"train": num_records, "test": 0}, -(-num_records // 10))
    for file in files:
        records = (
            {
                "latents": rng.standard_normal(latent_shape, np.float32),
                "caption": captions[i % len(captions)],
                "picture": str(i),
            }
            for i in file.pictures
        )
        count, _ = latents.write_records(directory / file.name, latent_shape, records)
        shards.append(Shard(file.name, count, (directory / file.name).stat().length, "", []))
    latents.write_metadata(directory, latent_shape, {"train": shards})
    return LatentDrawings(directory, "train", latent_shape)
