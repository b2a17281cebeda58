"""The same pictures with captions and questions in every form that `lattejax.encode` reads, by the forms' libraries.

Each function takes an empty directory and returns settings of `config.images`.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tensorflow_datasets as tfds
import webdataset
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image

from tests import pictures

COUNT = 12
SPLITS = {"train": "train[4:]", "test": "train[:4]"}
ANSWERS = {"a temple in China": "a temple", "a flower": "a flower"}


def records() -> list[dict[str, Any]]:
    """Each picture has two captions and two questions; the second is its size, and so its answers differ."""
    made = []
    for name, caption, image in pictures.pieces(COUNT):
        pairs = [("What is this?", ANSWERS[caption]), ("How wide?", f"{image.width} pixels")]
        captions = [caption, f"{caption}, {image.width} by {image.height}"]
        made.append({"name": name, "file": as_jpeg(image), "captions": captions, "pairs": pairs})
    return made


def as_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def save_files(path: Path) -> None:
    path.mkdir(parents=True)
    for record in records():
        (path / record["name"]).write_bytes(record["file"])


def folder(path: Path) -> dict[str, Any]:
    save_files(path / "files")
    with (path / "files" / "metadata.jsonl").open("w") as lines:
        for record in records():
            questions = [{"question": question, "answer": answer} for question, answer in record["pairs"]]
            values = {"file_name": record["name"], "text": record["captions"], "questions": questions}
            lines.write(json.dumps(values) + "\n")
    return {"source": "folder", "name": str(path / "files")}


def llava(path: Path) -> dict[str, Any]:
    save_files(path / "files")
    made = []
    for record in records():
        talk = []
        for i, (question, answer) in enumerate(record["pairs"]):
            talk.append({"from": "human", "value": question if i else f"<image>\n{question}"})
            talk.append({"from": "gpt", "value": answer})
        made.append({"id": record["name"], "image": record["name"], "text": record["captions"], "conversations": talk})
    (path / "talks.json").write_text(json.dumps(made, indent=1))
    return {"source": "llava", "name": str(path / "talks.json"), "data_dir": str(path / "files")}


def prepare(path: Path, name: str, features: dict[str, Any], values: Iterable[dict[str, Any]], count: int) -> None:
    """Prepares a data set as tensorflow-datasets would."""
    directory = epath.Path(path) / name / "1.0.0"
    directory.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features)
    writer = ArrayRecordWriter(str(directory / f"{name}-train.array_record-00000-of-00001"), "group_size:1")
    for one in values:
        writer.write(features.serialize_example(features.encode_example(one)))
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, split="train", filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(name="train", shard_lengths=[count], num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=directory, features=features, split_infos=[info], check_data=False)


def of_tfds(path: Path) -> dict[str, Any]:
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
        "talk": tfds.features.Sequence({"question": tfds.features.Text(), "answer": tfds.features.Text()}),
    }
    values = []
    for record in records():
        captions = [{"id": i, "text": text} for i, text in enumerate(record["captions"])]
        talk = [{"question": question, "answer": answer} for question, answer in record["pairs"]]
        values.append({"image": io.BytesIO(record["file"]), "captions": captions, "talk": talk})
    prepare(path, "mine", features, values, COUNT)
    keys = {"caption_key": "captions/text", "question_key": "talk/question", "answer_key": "talk/answer"}
    return {"source": "tfds", "name": "mine", "data_dir": str(path), "image_key": "image"} | keys


def labelled(path: Path, names: list[str], labels: list[int]) -> None:
    """A data set of class labels, as ImageNet is; -1: no label."""
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=names)}
    files = [record["file"] for record in records()]
    values = [{"image": io.BytesIO(file), "label": label} for file, label in zip(files, labels, strict=False)]
    prepare(path, "labelled", features, values, len(values))


def of_webdataset(path: Path) -> dict[str, Any]:
    """Three records in each tar file; so splits count files."""
    path.mkdir(parents=True, exist_ok=True)
    made = records()
    for shard in range(4):
        with webdataset.TarWriter(str(path / f"{shard:03d}.tar")) as tar:
            for record in made[3 * shard : 3 * shard + 3]:
                questions = [{"question": question, "answer": answer} for question, answer in record["pairs"]]
                described = {"text": record["captions"], "questions": questions, "original_width": 7}
                tar.write({"__key__": record["name"][:3], "jpg": record["file"], "json": described})
    splits = {"train": "train[1:]", "test": "train[:1]"}
    return {"source": "webdataset", "name": str(path / "{000..003}.tar")} | splits


def hugging_face(path: Path) -> dict[str, Any]:
    path.mkdir(parents=True, exist_ok=True)
    made = records()
    rows = {
        "image": [{"bytes": record["file"], "path": None} for record in made],
        "texts": [record["captions"] for record in made],
        "conversations": [
            [
                {"from": speaker, "value": text}
                for pair in record["pairs"]
                for speaker, text in zip(("human", "gpt"), pair, strict=True)
            ]
            for record in made
        ],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.to_parquet(path / "mine.parquet")
    keys = {"image_key": "image", "caption_key": "texts", "conversations_key": "conversations"}
    return {"source": "hugging_face", "name": str(path / "mine.parquet"), "data_dir": str(path / "cache")} | keys


FORMS = {
    "folder": folder,
    "llava": llava,
    "tfds": of_tfds,
    "webdataset": of_webdataset,
    "hugging_face": hugging_face,
}
