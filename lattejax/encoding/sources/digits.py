"""The digits of `data.digits`, in their order."""

import functools
import io
from collections.abc import Iterator, Sequence

from PIL import Image

from lattejax.configuration import Images
from lattejax.data import digits
from lattejax.encoding.items import Item, Picture, make_item
from lattejax.encoding.order import Part


class DigitRecords:
    """scikit-learn's digits with their captions and questions, see `sources.Records`."""

    identity = version = "scikit-learn's digits"
    names, names_are_shards = None, False

    def __init__(self, images: Images):
        self.sizes = {split: len(digits.load(split).labels) for split in ("train", "test")}

    def read(self, part: Part, names: Sequence[str]) -> Iterator[Item]:
        known = digits.load(part.split)
        for index in part.records:
            name, label = f"{part.split} digit {index}", int(known.labels[index])
            pairs = [digits.question_and_answer(label, kind, index) for kind in range(digits.QUESTIONS_PER_IMAGE)]
            yield make_item(
                name,
                [Picture(name, functools.partial(_as_png, part.split, index))],
                captions=digits.CAPTIONS[label],
                questions=[{"question": question, "answer": answer} for question, answer in pairs],
                drawn=0,
            )


def _as_png(split: str, index: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(digits.load(split).images[index]).save(file, "PNG")
    return file.getvalue()
