"""What `lattejax.encode` can read, one file each; `config.images.source` chooses."""

import importlib
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from lattejax.configuration import Images
from lattejax.encoding.items import Item
from lattejax.encoding.order import Part
from lattejax.errors import UserError, require

# The location of each class. It is imported on demand, because dependencies are slow to import, or optional.
SOURCES = {
    "digits": "lattejax.encoding.sources.digits:DigitRecords",
    "folder": "lattejax.encoding.sources.folder:FolderRecords",
    "hugging_face": "lattejax.encoding.sources.hugging_face:HuggingFaceRecords",
    "llava": "lattejax.encoding.sources.llava:LlavaRecords",
    "tfds": "lattejax.encoding.sources.tfds:DatasetRecords",
    "webdataset": "lattejax.encoding.sources.webdataset:WebDatasetRecords",
}


@runtime_checkable
class Records(Protocol):
    """A data set: records in one or several splits, which `read` streams.

    Attributes:
      identity: identifies the data set, but not its contents.
      version: changes whenever pictures or texts do.
      sizes: the number of records in each of its splits.
      names: the records' names, if their order may change between two calls, as that of a folder's files does when some
        are added; there is one split then.
      names_are_shards: whether a name is not of a record, but of a file of records, which become one shard.
    """

    identity: str
    version: str
    sizes: dict[str, int]
    names: Sequence[str] | None
    names_are_shards: bool

    def __init__(self, images: Images):
        """Raises `UserError` if the data set is missing or of another form."""

    def read(self, part: Part, names: Sequence[str]) -> Iterator[Item]:
        """Yields the records of a part, in order; bad ones with their `problem`. `names` are the part's, if the source
        names its records."""


def open_records(images: Images) -> Records:
    """Opens the data set that a config names.

    Raises:
      UserError: the source is unknown, a package is missing, or see `Records`.
    """
    if images.source not in SOURCES:
        raise UserError(f"config.images.source={images.source!r} is unknown; use one of {', '.join(SOURCES)}")
    require("tensorflow_datasets", "data", "encoding pictures")
    module, _, cls = SOURCES[images.source].partition(":")
    return getattr(importlib.import_module(module), cls)(images)
