"""A data set of Hugging Face: a name on the hub, or a directory or file of parquet."""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from lattejax.configuration import Images
from lattejax.encoding.items import Item, Picture, checked
from lattejax.encoding.order import Part
from lattejax.encoding.sources.features import NO_LABEL, check_keys, keyed_item
from lattejax.errors import UserError, parsing, require
from lattejax.files import read_bytes, resolve_path

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HuggingFaceRecords:
    """A data set that `datasets.load_dataset` opens, see `sources.Records`.

    `config.images.name` is a name on the hub, "owner/name" or "owner/name:configuration", or a local path.
    """

    names, names_are_shards = None, False

    def __init__(self, images: Images):
        require("datasets", "hub", "reading Hugging Face data sets")
        import datasets

        self.images = images
        path, _, configuration = images.name.partition(":")
        local = Path(resolve_path(path))
        arguments: dict[str, Any] = {"path": path, "name": configuration or None}
        if local.is_file():
            arguments = {"path": "parquet", "data_files": str(local)}
        elif local.is_dir():
            arguments["path"] = str(local)
        elif not HUB_NAME.fullmatch(path):
            raise UserError(f"config.images.name={images.name!r} is neither on this disk nor a name on the hub")
        with parsing(f"config.images.name={images.name!r}"):
            splits = datasets.load_dataset(**arguments, cache_dir=images.data_dir or None)
        self.splits = {name: _undecoded(split, datasets) for name, split in splits.items()}
        self.sizes = {name: len(split) for name, split in self.splits.items()}
        for name, split in self.splits.items():
            check_keys(images, split.column_names)
            for key in images.keys.values():
                if key.partition("/")[0] not in split.column_names:
                    known = ", ".join(split.column_names)
                    raise UserError(f"{images.name} has no such column {key!r} in {name!r}; it has {known}")
        self.identity = f"the data set {images.name}"
        self.version = " ".join(split._fingerprint for split in self.splits.values())

    def read(self, part: Part, names: Sequence[str]) -> Iterator[Item]:
        split = self.splits[part.split].select(part.records)
        for index, record in zip(part.records, split.to_iterable_dataset(), strict=True):
            name = f"{part.split}, row {index}"
            yield checked(name, functools.partial(keyed_item, name, record, self.images, _picture, self._text))

    def _text(self, key: str, value: Any) -> Any:
        feature = self.splits and next(iter(self.splits.values())).features.get(key)
        if not hasattr(feature, "int2str") or not isinstance(value, int):
            return value
        if value < 0:
            raise UserError(NO_LABEL)
        return feature.int2str(value)


def _undecoded(split: Any, datasets: Any) -> Any:
    """The split with images as files' bytes, not as pixels."""
    for name, feature in split.features.items():
        if isinstance(feature, datasets.Image):
            split = split.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            split = split.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return split


def _picture(value: Any, name: str) -> Picture:
    if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
        raise UserError(f"{name} is no image")
    if value.get("bytes"):
        return Picture(name, lambda: value["bytes"], len(value["bytes"]))
    return Picture(name, functools.partial(read_bytes, epath.Path(value["path"])))
