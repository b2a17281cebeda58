"""The data loader's rates of latents and of questions, and their limits, measured in the same run."""

import io
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from lattejax.configuration import Config
from lattejax.data import conversations
from lattejax.data.conversations import Message
from lattejax.data.examples import image_batcher
from lattejax.data.images import decode_image
from lattejax.data.latents import LatentSource, StoredDrawings, StoredQuestions
from lattejax.data.pipeline import Batches
from lattejax.data.prompts import EncodedPrompt, PromptEncoder, question_batch
from lattejax.data.stored import (
    CAPTIONS,
    IMAGES,
    LATENTS,
    QUESTIONS,
    RecordWriter,
    Shard,
    StoredFile,
    StoredRecords,
    features,
    file_name,
    shard_name,
)
from lattejax.errors import UserError

NUM_CAPTIONS = 1000  # if contexts are shared
WORDS = ("a", "red", "blue", "bicycle", "against", "the", "wall", "wooden", "soup", "from", "above", "dog", "photo")
DISTINCT_PICTURES = 32
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
    batch_size = config.train.batch_size
    with tempfile.TemporaryDirectory() as path:
        captions = make_captions(NUM_CAPTIONS if config.train.share_contexts else num_records)
        if not config.train.share_contexts:
            check_fit(encoder, captions, config.data.prompt_length)
        drawings = _write(epath.Path(path), config.data.latent_shape, num_records, captions)
        make_batch = image_batcher(config, encoder, captions, drawings.bounds)
        batches = _batches(config, drawings, make_batch, batch_size)
        rate, limit = measure(batches, num_records, batch_size, config.data.threads, drawings.records.__getitems__)
    return _figures(rate, limit, batch_size) | {
        "latents_per_second": rate,
        "records_per_second": limit,
        "megabytes_per_second": rate * 4 * int(np.prod(config.data.latent_shape)) / 1e6,
    }


def question_rate(config: Config, encoder: PromptEncoder, num_records: int) -> dict[str, Any]:
    """Questions per second of the loader alone, each about a picture of its own, of `data.max_pixels`.

    The pictures are JPEGs in the real format. The limit is the rate at which one thread decodes and resizes them as the
    vision tower's processor does. Both as in `data_rate`.
    """
    batch_size = config.train.answer_batch_size
    with tempfile.TemporaryDirectory() as path:
        questions, pictures = _write_questions(epath.Path(path), config, encoder, num_records)

        def make_batch(records: Sequence[EncodedPrompt], positions: Sequence[int]) -> dict[str, Any]:
            return question_batch(encoder, records, config.data.answer_length, questions.bounds)

        batches = _batches(config, questions, make_batch, batch_size)

        def decode(indices: Sequence[int]) -> None:
            for record in pictures.__getitems__(indices):
                encoder.read_image(decode_image(io.BytesIO(record), "a picture"))

        rate, limit = measure(batches, num_records, batch_size, config.data.threads, decode)
    return _figures(rate, limit, batch_size) | {"questions_per_second": rate, "pictures_per_second": limit}


def _batches(config: Config, source: Any, make_batch: Callable, batch_size: int) -> Batches:
    return Batches(source, make_batch, batch_size=batch_size, seed=config.seed, threads=config.data.threads)


def _figures(rate: float, limit: float, batch_size: int) -> dict[str, Any]:
    return {
        "seconds": batch_size / rate,
        "limit": batch_size / limit,
        "share_of_limit": rate / limit,
        "batch_size": batch_size,
    }


def measure(
    batches: Batches, num_records: int, batch_size: int, threads: int, read: Callable[[list[int]], Any]
) -> tuple[float, float]:
    """Records per second of `batches`, and of `read` on as many random indices."""
    rng, ours, limits = np.random.default_rng(0), [], []
    steps = max(2, num_records // batch_size)
    for _ in range(REPEATS):
        list(itertools.islice(batches, 2 * threads + 1))  # discards the prefetched batches
        started = time.perf_counter()
        list(itertools.islice(batches, steps))
        ours.append(time.perf_counter() - started)
        chosen = [rng.integers(num_records, size=batch_size).tolist() for _ in range(steps)]
        time.sleep(0.5)  # until prefetching has finished
        started = time.perf_counter()
        for indices in chosen:
            read(indices)
        limits.append(time.perf_counter() - started)
    rate, limit = (steps * batch_size / float(np.median(seconds[1:])) for seconds in (ours, limits))
    return rate, limit


def make_captions(count: int) -> list[str]:
    """`count` distinct captions of twenty words and a number."""
    rng = np.random.default_rng(0)
    return [f"{' '.join(rng.choice(WORDS, 20))} {i}" for i in range(count)]


def check_fit(encoder: PromptEncoder, captions: Sequence[str], limit: int) -> None:
    """Raises `UserError` if the captions' prompts are too long, by the first hundred."""
    longest = max(len(encoder.drawing(caption).input_ids) for caption in captions[:100])
    if longest > limit:
        raise UserError(
            f"the prompts of this benchmark, of twenty words, have up to {longest} tokens, more than "
            f"config.data.prompt_length={limit}; add --config.data.prompt_length={longest + 8}"
        )


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


def _write_questions(
    directory: epath.Path, config: Config, encoder: PromptEncoder, num_records: int
) -> tuple[StoredQuestions, StoredRecords]:
    """Questions, and the pictures they are about."""
    side = int(config.data.max_pixels**0.5)
    rng, smooth = np.random.default_rng(0), []
    for _ in range(DISTINCT_PICTURES):  # photographs' rates need something smooth
        small = Image.fromarray(rng.integers(0, 255, (8, 8, 3)).astype(np.uint8))
        file = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        smooth.append(file.getvalue())
    paths = {kind: directory / file_name(kind, shard_name("train", 0)) for kind in (QUESTIONS, IMAGES)}
    with RecordWriter(paths[QUESTIONS]) as questions, RecordWriter(paths[IMAGES]) as images:
        for i in range(num_records):
            images.write(smooth[i % len(smooth)])
            asked = Message("user", (i, "What?")), Message("assistant", (str(i),))
            questions.write(json.dumps(conversations.to_json(asked)).encode())
    files = {kind: StoredFile(path.name, num_records, 0, "") for kind, path in paths.items()}
    shards = {"train": (Shard(files, []),)}
    source = LatentSource(directory, config.data.latent_shape, (), (), shards, 1, ((side, side),), 1)
    return StoredQuestions(source, "train", encoder), StoredRecords(directory, [files[IMAGES]])
