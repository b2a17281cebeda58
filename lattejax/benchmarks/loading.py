"""The data loader's rate of latents, and the limit set by reading the files, measured in the same run."""

import itertools
import json
import tempfile
import time
from typing import Any

import numpy as np
from etils import epath

from lattejax.configuration import Config
from lattejax.data.examples import image_batcher
from lattejax.data.latents import LatentSource, StoredDrawings
from lattejax.data.pipeline import Batches
from lattejax.data.prompts import PromptEncoder
from lattejax.data.stored import (
    CAPTIONS,
    LATENTS,
    RecordWriter,
    Shard,
    StoredFile,
    features,
    file_name,
    shard_name,
)

NUM_CAPTIONS = 1000  # if contexts are shared
WORDS = ("a", "red", "blue", "bicycle", "against", "the", "wall", "wooden", "soup", "from", "above", "dog", "photo")
REPEATS = 7
SHARDS = 10


def data_rate(config: Config, encoder: PromptEncoder, num_records: int) -> dict[str, Any]:
    """Latents per second of the loader alone, read as in training, after warm-up.

    Random latents of the config's shape are written in the real format, in ten files, and read back shuffled, with the
    config's batch size and threads. If contexts are shared, they have the indices of 1,000 captions; otherwise each has
    its own caption of twenty words, which is encoded as a prompt. The limit is the rate of reading the same records as
    bytes, in batches and in random order, without decoding, shuffling or stacking. Both are medians over alternating
    repeats; `seconds` and `limit` are per batch.
    """
    data, batch_size = config.data, config.train.batch_size
    with tempfile.TemporaryDirectory() as path:
        captions = make_captions(NUM_CAPTIONS if config.train.share_contexts else num_records)
        drawings = _write(epath.Path(path), data.latent_shape, num_records, captions)
        batches = Batches(
            drawings,
            image_batcher(config, encoder, captions, drawings.bounds),
            batch_size=batch_size,
            seed=config.seed,
            threads=data.threads,
        )
        rng, ours, limits = np.random.default_rng(0), [], []
        steps = max(2, num_records // batch_size)
        for _ in range(REPEATS):
            list(itertools.islice(batches, 2 * data.threads + 1))  # discards the prefetched batches
            started = time.perf_counter()
            list(itertools.islice(batches, steps))
            ours.append(time.perf_counter() - started)
            chosen = [rng.integers(num_records, size=batch_size).tolist() for _ in range(steps)]
            time.sleep(0.5)  # until prefetching has finished
            started = time.perf_counter()
            for indices in chosen:
                drawings.records.__getitems__(indices)
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
    """`count` distinct captions of twenty words and a number."""
    rng = np.random.default_rng(0)
    return [f"{' '.join(rng.choice(WORDS, 20))} {i}" for i in range(count)]


def _write(
    directory: epath.Path, latent_shape: tuple[int, int, int], num_records: int, captions: list[str]
) -> StoredDrawings:
    rng, shards, size = np.random.default_rng(0), [], -(-num_records // SHARDS)
    for index in range(SHARDS):
        writers = {kind: directory / file_name(kind, shard_name("train", index)) for kind in (LATENTS, CAPTIONS)}
        with RecordWriter(writers[LATENTS]) as latents, RecordWriter(writers[CAPTIONS]) as texts:
            serializer = features(latent_shape)
            for i in range(index * size, min((index + 1) * size, num_records)):
                values = {"latents": rng.standard_normal(latent_shape, np.float32), "picture": str(i)}
                latents.write(serializer.serialize_example(values))
                texts.write(json.dumps({"name": str(i), "prompts": [[captions[i % len(captions)], []]]}).encode())
        count = latents.records
        shards.append(Shard({kind: StoredFile(path.name, count, 0, "") for kind, path in writers.items()}, []))
    return LatentSource(directory, latent_shape, (), (), {"train": tuple(shards)}).drawings("train")
