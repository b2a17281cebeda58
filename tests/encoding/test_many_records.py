"""A hundred thousand records of each form are read in a stream: memory does not grow with what has been read."""

import dataclasses
import io
import itertools
import json
import tarfile

import datasets
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lattejax.encoding.order import divide, first_order
from lattejax.encoding.sources import open_records
from tests import forms
from tests.helpers import tiny_config

COUNT, MOST_GROWTH = 100_000, 16e6  # bytes
QUESTION = {"question": "What is this?", "answer": "nothing at all"}


def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def folder(path):
    file = picture()
    with (path / "metadata.jsonl").open("w") as lines:
        for i in range(COUNT):
            (path / f"{i}.png").write_bytes(file)
            lines.write(json.dumps({"file_name": f"{i}.png", "text": f"text {i}", "questions": [QUESTION]}) + "\n")
    return {"source": "folder", "name": str(path)}


def llava(path):
    (path / "0.png").write_bytes(picture())
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "nothing at all"}]
    made = [{"id": i, "image": "0.png", "text": f"text {i}", "conversations": talk} for i in range(COUNT)]
    (path / "talks.json").write_text(json.dumps(made))
    return {"source": "llava", "name": str(path / "talks.json")}


def of_tfds(path):
    features = {"image": tfds.features.Image(encoding_format="png"), "text": tfds.features.Text()}
    file = picture()
    forms.prepare(
        path, "many", features, ({"image": io.BytesIO(file), "text": f"text {i}"} for i in range(COUNT)), COUNT
    )
    keys = {"image_key": "image", "caption_key": "text"}
    return {"source": "tfds", "name": "many", "data_dir": str(path)} | keys


def of_webdataset(path):
    file = picture()
    for shard in range(10):
        with tarfile.open(path / f"{shard}.tar", "w") as tar:
            for i in range(COUNT // 10):
                for extension, data in (("png", file), ("txt", f"text {i}".encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return {"source": "webdataset", "name": str(path / "*.tar")}


def hugging_face(path):
    rows = {"image": [{"bytes": picture(), "path": None}] * COUNT, "text": [f"text {i}" for i in range(COUNT)]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path / "many.parquet")
    keys = {"image_key": "image", "caption_key": "text"}
    return {"source": "hugging_face", "name": str(path / "many.parquet"), "data_dir": str(path / "cache")} | keys


def memory() -> int:
    """The memory that this process holds, without files that are mapped."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


@pytest.mark.slow
@pytest.mark.parametrize("make", [folder, llava, of_tfds, of_webdataset, hugging_face])
def test_memory_does_not_grow_while_records_are_read(make, tmp_path):
    images = dataclasses.replace(tiny_config().images, **make(tmp_path))
    source = open_records(images)
    order = first_order(source.sizes, source.names)
    size = 1 if source.names_are_shards else 1000
    both = divide(order, {"train": "train[1:]", "test": "train[:1]"}, size)
    parts = [*both["train"], *both["test"]]
    items = itertools.chain.from_iterable(
        source.read(part, () if order.names is None else order.names[part.records.start : part.records.stop])
        for part in parts
    )
    held, read = [], 0
    for item in items:
        assert not item.problem and item.pictures[item.drawn].read()
        read += 1
        if read % (COUNT // 5) == 0:
            held.append(memory())
    assert read == COUNT
    assert max(held) - held[0] < MOST_GROWTH, held
