"""Data that changes after it was encoded: additions, corrections, replaced pictures, and what is refused."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from lattejax.data import tokenizer as tokenizers
from lattejax.data.pipeline import every
from lattejax.data.prompts import prompt_encoder
from lattejax.encoding import encode as encoding
from lattejax.encoding.encode import encode
from lattejax.encoding.shards import ShardWriter
from lattejax.encoding.sources import open_records
from lattejax.encoding.written import Written
from lattejax.errors import UserError
from lattejax.runs.data import open_data
from lattejax.training.checks import check_lengths
from lattejax.weights.pretrained import Pretrained
from tests import checkpoints, forms, pictures
from tests.helpers import encoder_for, tiny_config


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder of twelve pictures with captions and questions, encoded; eight to train on, in shards of three."""
    path = tmp_path_factory.mktemp("changes")
    images = forms.folder(path / "data")
    config = pixels(path / "latents", shard_pictures=3, **forms.SPLITS | images)
    assert encode(config, config.data.latents)
    return config


def pixels(latents, **images):
    """A config whose latents are pixels in colour, so that no autoencoder is needed."""
    config = pictures.config(latents.with_name("none"), "pixels", data__latent_shape=(16, 16, 3), model__patch_size=4)
    data = dataclasses.replace(config.data, latents=str(latents), max_pixels=1024, prompt_length=64, answer_length=128)
    return dataclasses.replace(config, images=dataclasses.replace(config.images, **images), data=data)


@pytest.fixture
def config(encoded, tmp_path):
    """A copy of it, whose folder and latents may be changed."""
    folder = shutil.copytree(encoded.images.name, tmp_path / "files")
    latents = shutil.copytree(encoded.data.latents, tmp_path / "latents")
    images = dataclasses.replace(encoded.images, name=str(folder))
    return dataclasses.replace(encoded, images=images, data=dataclasses.replace(encoded.data, latents=str(latents)))


def stamps(config, kind):
    files = sorted(file for file in os.listdir(config.data.latents) if file.startswith(kind))
    return {file: os.stat(os.path.join(config.data.latents, file)).st_mtime_ns for file in files}


def changed(config, change):
    """Makes a change, encodes again, and returns the files that were written again, by kind."""
    before = {kind: stamps(config, kind) for kind in ("latents", "captions", "questions", "images")}
    change()
    assert encode(config, config.data.latents)
    after = {kind: stamps(config, kind) for kind in before}
    return {kind: [name for name, time in after[kind].items() if before[kind].get(name) != time] for kind in before}


def rewrite(config, edit):
    """Edits the lines of the folder's metadata."""
    path = os.path.join(config.images.name, "metadata.jsonl")
    with open(path) as file:
        lines = [json.loads(line) for line in file]
    edit(lines)
    with open(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def content(config, split="train"):
    """Latents by captions, and questions with answers, of a split."""
    source, encoder = open_data(config), encoder_for(config)
    questions = source.questions(split, encoder)
    drawings = {
        tuple(prompt.caption for prompt in drawing.prompts): drawing.latents
        for drawing in every(source.drawings(split, encoder))
    }
    return drawings, [questions.text(i) for i in range(len(questions))]


def assert_as_new(config, tmp_path):
    """What is there is what an encoding of the same data from nothing would hold, up to the order of what was added."""
    for ours, theirs in compared_with_new(config, tmp_path):
        assert_same(ours, theirs)


def assert_as_new_in_all(config, tmp_path):
    """The same of both splits together."""
    both = zip(*compared_with_new(config, tmp_path), strict=True)
    assert_same(*(({**train[0], **test[0]}, train[1] + test[1]) for train, test in both))


def compared_with_new(config, tmp_path):
    """For each split what is there, and what is there if it is encoded from nothing."""
    fresh = dataclasses.replace(config, data=dataclasses.replace(config.data, latents=str(tmp_path / "fresh")))
    assert encode(fresh, fresh.data.latents)
    return [(content(config, split), content(fresh, split)) for split in ("train", "test")]


def assert_same(ours, theirs):
    (ours, asked), (theirs, expected) = ours, theirs
    assert sorted(asked) == sorted(expected) and ours.keys() == theirs.keys()
    for caption, latents in ours.items():
        np.testing.assert_array_equal(latents, theirs[caption])


def test_an_encoding_that_is_complete_is_left_as_it_is(config):
    """Also if all files are touched, as a copy of the folder would: then texts and pictures are compared, and nothing
    is written. A directory of an earlier version does not know its pictures: its texts are written again then."""
    assert not any(changed(config, lambda: None).values())

    def touch():
        for entry in os.scandir(config.images.name):
            os.utime(entry, ns=(1, 1))

    assert not any(changed(config, touch).values())
    as_of_earlier_versions(config)
    assert not any(changed(config, lambda: None).values())
    for entry in os.scandir(config.images.name):
        os.utime(entry, ns=(2, 2))
    written = changed(config, lambda: None)
    assert not written["latents"] and len(written["captions"]) == 5


def as_of_earlier_versions(config):
    """Removes from the shards' descriptions what earlier versions did not write."""
    for file in Path(config.data.latents).glob("t*-0*.json"):
        values = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in values.items() if key not in ("contents", "limits")}))


def test_a_corrected_caption_or_question_rewrites_its_shards_texts_and_keeps_its_latents(config, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "make_encoder", lambda *_: pytest.fail("latents are computed again"))
    before = open_data(config).identities

    def edit(lines):
        lines[5]["text"][0] = "a corrected caption"
        lines[5]["questions"][0]["answer"] = "a corrected answer"

    written = changed(config, lambda: rewrite(config, edit))
    assert not written["latents"] and len(written["captions"]) == len(written["questions"]) == 1
    assert open_data(config).identities != before, "a run on the earlier texts does not resume on these"
    monkeypatch.undo()
    assert_as_new(config, tmp_path)


def test_a_question_may_be_added_to_a_picture_that_had_none(config, tmp_path):
    """Then the picture is stored for the vision tower too."""
    rewrite(config, lambda lines: lines[3].pop("questions"))
    encode(config, config.data.latents)
    images = sum(shard.files["images"].records for shards in open_data(config).shards.values() for shard in shards)
    asked = {"question": "New?", "answer": "yes"}
    written = changed(config, lambda: rewrite(config, lambda lines: lines[3].update(questions=[asked])))
    assert not written["latents"] and len(written["images"]) == 1
    shards = open_data(config).shards.values()
    assert sum(shard.files["images"].records for of_split in shards for shard in of_split) == images + 1
    assert_as_new(config, tmp_path)


def test_pictures_are_added_in_new_shards(config, tmp_path):
    """No file that was there is written again, and no picture changes between training and held out."""
    held_out = content(config, "test")[0].keys()

    def add():
        for i, (_, _, image) in enumerate(pictures.pieces(17)[12:]):
            image.save(os.path.join(config.images.name, f"a{i}.jpg"))  # by name before the others
        new = [{"file_name": f"a{i}.jpg", "text": f"a new one, {i}"} for i in range(5)]
        rewrite(config, lambda lines: lines.extend(new))

    written = changed(config, add)
    assert written["latents"] == ["latents-train-00003.array_record", "latents-train-00004.array_record"]
    drawings, _ = content(config)
    assert len(drawings) == 13 and content(config, "test")[0].keys() == held_out
    assert {("a new one, 3",), ("a new one, 4",)} < drawings.keys()


def test_a_share_cannot_be_held_out_of_data_that_grows(config):
    grown = dataclasses.replace(config.images, train="train[25%:]", test="train[:25%]")
    other = dataclasses.replace(
        config, images=grown, data=dataclasses.replace(config.data, latents=config.data.latents + "2")
    )
    assert encode(other, other.data.latents)
    Image.new("RGB", (8, 8)).save(os.path.join(config.images.name, "new.png"))
    lines = [{"file_name": "new.png", "text": "new"}]
    rewrite(config, lambda known: known.extend(lines))
    for i in range(4):
        shutil.copy(os.path.join(config.images.name, "new.png"), os.path.join(config.images.name, f"{i}.png"))
        rewrite(config, lambda known, i=i: known.append({"file_name": f"{i}.png", "text": "new"}))
    with pytest.raises(UserError, match=r"hold out a number \(train\[:1\]\), not a share"):
        encode(other, other.data.latents)
    assert len(open_data(other).drawings("train")) == 9, "what is there is as it was"


def test_a_replaced_picture_is_encoded_again_and_a_missing_one_is_named(config, tmp_path):
    name = os.path.join(config.images.name, "005.jpg")
    written = changed(config, lambda: Image.new("RGB", (30, 20), "red").save(name))
    assert len(written["latents"]) == 1
    assert_as_new(config, tmp_path)
    rewrite(config, lambda lines: lines.pop(2))
    with pytest.raises(UserError, match=r"lacks 1 records that it had, such as '002\.jpg'; use another --out"):
        encode(config, config.data.latents)


def spoil_a_line(folder):
    path = folder / "metadata.jsonl"
    good = path.read_text()
    path.write_text(good.replace('"file_name": "005.jpg"', '"file_nam": "005.jpg"'))
    return lambda: path.write_text(good)


def spoil_a_picture(folder):
    (folder / "005.jpg").write_bytes(b"no picture")
    path = folder / "metadata.jsonl"
    kept = "".join(line for line in path.read_text().splitlines(True) if "005.jpg" not in line)
    return lambda: path.write_text(kept)


def name_in_latin_1(folder):
    bad = os.fsencode(folder) + b"/caf\xe9.jpg"
    os.rename(folder / "005.jpg", bad)
    path = folder / "metadata.jsonl"
    good = path.read_text()
    path.write_text(good.replace("005.jpg", "caf\\udce9.jpg"))
    return lambda: (os.rename(bad, folder / "005.jpg"), path.write_text(good))


@pytest.mark.parametrize("spoil, most", [(spoil_a_line, 0), (spoil_a_picture, 1), (name_in_latin_1, 0)])
def test_a_record_that_was_left_out_may_be_repaired_renamed_or_removed(spoil, most, config, tmp_path):
    """As the message about it says. Its place in the order stays empty; no other record is encoded again."""
    images = dataclasses.replace(config.images, most_unreadable=most)
    config = dataclasses.replace(config, images=images)
    shutil.rmtree(config.data.latents)
    repair = spoil(Path(config.images.name))
    if most:
        assert encode(config, config.data.latents)
    else:
        with pytest.raises(UserError, match="repair them or allow more, and run"):
            encode(config, config.data.latents)
    before = stamps(config, "latents")
    repair()
    for _ in range(2):
        assert encode(config, config.data.latents)
    after = stamps(config, "latents")
    assert sum(after[name] != time for name, time in before.items()) == 1, "only the shard that left it out"
    assert_as_new_in_all(config, tmp_path)
    rewrite(config, lambda lines: lines.pop(2))
    with pytest.raises(UserError, match=r"lacks 1 records that it had, such as '002\.jpg'"):
        encode(config, config.data.latents)


def test_an_added_picture_that_was_left_out_may_be_removed_again(config):
    """Then its shard is empty."""
    picture = Path(config.images.name) / "zzz.jpg"
    picture.write_bytes(b"no picture")
    rewrite(config, lambda lines: lines.append(lines[0] | {"file_name": picture.name}))
    with pytest.raises(UserError, match="repair them or allow more, and run"):
        encode(config, config.data.latents)
    picture.unlink()
    rewrite(config, lambda lines: lines.pop())
    assert encode(config, config.data.latents)


def test_a_data_set_of_tensorflow_datasets_is_known_by_its_configuration(config, monkeypatch):
    """Earlier versions did not store it; with the version that they did store, theirs is completed."""
    file, version = Path(config.data.latents) / "encoding.json", open_records(config.images).version

    def encode_as(identity, version):
        def opened(images):
            source = open_records(images)
            source.identity, source.version = identity, version
            return source

        monkeypatch.setattr(encoding, "open_records", opened)
        return encode(config, config.data.latents)

    file.write_text(json.dumps(json.loads(file.read_text()) | {"source": "the data set coco"}))
    with pytest.raises(UserError, match="source was the data set coco, is the data set coco:2014"):
        encode_as("the data set coco:2014", "another version")
    assert encode_as("the data set coco:2017", version)
    assert json.loads(file.read_text())["source"] == "the data set coco:2017"
    with pytest.raises(UserError, match="source was the data set coco:2017, is the data set coco:2014"):
        encode_as("the data set coco:2014", version)


def test_a_worker_does_not_complete_what_the_others_have_not_seen_changing(config, monkeypatch):
    """It writes no manifest of their shards as they were; and one that is there when a shard changes is removed."""
    rewrite(config, lambda lines: [line.update(text=f"text {i}") for i, line in enumerate(lines)])
    manifest = Path(config.data.latents) / "manifest.json"
    kept, write, save = manifest.read_text(), ShardWriter.write, Written.save
    assert not encode(config, config.data.latents, 0, 2) and not manifest.exists()

    def written_meanwhile(*args):
        manifest.write_text(kept)
        return write(*args)

    def checked_save(*args):
        assert not manifest.exists()
        save(*args)

    monkeypatch.setattr(ShardWriter, "write", written_meanwhile)
    monkeypatch.setattr(Written, "save", checked_save)
    assert encode(config, config.data.latents, 1, 2) and manifest.read_text() != kept
    assert all(caption.startswith("text ") for caption in open_data(config).captions)
    assert encode(config, config.data.latents, 0, 2)


@pytest.mark.parametrize("by", ["its time", "its texts"])
def test_a_picture_of_the_same_size_is_noticed(by, config, tmp_path):
    """Its bytes are hashed if its file, or the file with its texts, has another time."""
    name = os.path.join(config.images.name, "005.jpg")
    with open(name, "rb") as file:
        data = bytearray(file.read())
    time = os.stat(name).st_mtime_ns
    data[-3] ^= 1

    def change():
        with open(name, "wb") as file:
            file.write(data)
        if by == "its texts":
            os.utime(name, ns=(time, time))
            rewrite(config, lambda lines: lines[5].update(text="changed with its picture"))

    assert len(changed(config, change)["latents"]) == 1
    assert_as_new(config, tmp_path)


def test_a_replaced_picture_that_is_no_record_of_its_own_is_noticed(config, tmp_path):
    """One that a prompt of a folder shows, of the same size in bytes; and one of LLaVA's form."""
    shown = Path(config.images.name) / "shown.bmp"
    Image.new("RGB", (20, 20), "blue").save(shown)
    rewrite(config, lambda lines: lines[5].update(prompt_images=["shown.bmp"]))
    assert encode(config, config.data.latents)
    written = changed(config, lambda: Image.new("RGB", (20, 20), "red").save(shown))
    assert not written["latents"] and len(written["images"]) == 1
    talks = pixels(tmp_path / "talks", shard_pictures=3, **forms.SPLITS | forms.llava(tmp_path / "data"))
    assert encode(talks, talks.data.latents)
    picture = tmp_path / "data" / "files" / "005.jpg"
    assert len(changed(talks, lambda: Image.new("RGB", (30, 20), "red").save(picture))["latents"]) == 1


def test_what_changes_while_it_is_encoded_is_noticed_the_next_time(config, tmp_path, monkeypatch):
    publish, published = ShardWriter._publish, []

    def replaced_then(writer):
        if not published:
            for file in Path(config.images.name).glob("*.jpg"):
                Image.open(file).transpose(Image.Transpose.ROTATE_180).save(file)
        published.append(writer.name)
        return publish(writer)

    monkeypatch.setattr(ShardWriter, "_publish", replaced_then)
    shutil.rmtree(config.data.latents)
    assert encode(config, config.data.latents)
    monkeypatch.undo()
    assert changed(config, lambda: None)["latents"] == ["latents-train-00000.array_record"]
    assert_as_new(config, tmp_path)


def test_a_summary_is_of_what_is_there_if_the_process_is_killed_before_it(config, monkeypatch):
    """Killed while it draws the contact sheet."""

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    Image.new("RGB", (8, 8)).save(os.path.join(config.images.name, "new.png"))
    rewrite(config, lambda lines: lines.append({"file_name": "new.png", "text": "new"}))
    monkeypatch.setattr("lattejax.encoding.summary.draw_sheet", killed)
    with pytest.raises(Killed):
        encode(config, config.data.latents)
    monkeypatch.undo()
    summary = Path(config.data.latents) / "summary.json"
    assert not summary.exists() and encode(config, config.data.latents)
    assert json.loads(summary.read_text())["train"]["pictures"] == 9


def test_a_process_that_is_killed_while_it_rewrites_texts_loses_nothing(config, tmp_path, monkeypatch):
    """Between any two of its steps."""
    rewrite(config, lambda lines: [line.update(text=f"text {i}") for i, line in enumerate(lines)])
    replace, steps = os.replace, []

    class Killed(BaseException):
        pass

    for step in range(0, 14, 2):
        count = iter(range(1000))

        def counted(*paths, count=count, step=step):
            if next(count) == step:
                raise Killed
            return replace(*paths)

        monkeypatch.setattr(os, "replace", counted)
        monkeypatch.setattr("pathlib.Path.replace", lambda self, target: counted(self, target))
        try:
            encode(config, config.data.latents)
        except Killed:
            steps.append(step)
        monkeypatch.undo()
    assert steps
    assert encode(config, config.data.latents)
    assert_as_new(config, tmp_path)


@pytest.mark.parametrize("before, now", [("*.tar", "*.tar"), ("{000..002}.tar", "{000..003}.tar")])
def test_tar_files_are_added_too(before, now, tmp_path):
    made = forms.of_webdataset(tmp_path / "data")
    grown = pixels(tmp_path / "latents", **made | {"name": str(tmp_path / "data" / now), "train": "train[1:]"})
    images = dataclasses.replace(grown.images, name=str(tmp_path / "data" / before))
    config = dataclasses.replace(grown, images=images)
    os.rename(tmp_path / "data" / "003.tar", tmp_path / "later.tar")
    assert encode(config, config.data.latents) and len(open_data(config).drawings("train")) == 6
    written = changed(grown, lambda: os.rename(tmp_path / "later.tar", tmp_path / "data" / "003.tar"))
    assert written["latents"] == ["latents-train-00002.array_record"]
    assert len(open_data(grown).drawings("train")) == 9
    if before != now:
        with pytest.raises(UserError, match=r"lacks 1 records that it had, such as '003\.tar'"):
            encode(config, config.data.latents)


def test_texts_that_training_would_refuse_are_refused_here(encoded, tmp_path):
    """With the tokenizer of the VLM to start from: a caption, and a conversation with its images."""
    vlm = checkpoints.convert(checkpoints.random_model(checkpoints.tiny_config(**checkpoints.OF_DIGITS)))
    images = dataclasses.replace(encoded.images, most_unreadable=12)
    model = tiny_config(model__text__vocab_size=checkpoints.VOCABULARY, model__patch_size=4).model
    data = dataclasses.replace(encoded.data, latents=str(tmp_path / "latents"))
    pretrain = dataclasses.replace(encoded.pretrain, init_from=str(vlm))
    config = dataclasses.replace(encoded, images=images, model=model, data=data, pretrain=pretrain)

    def left_out(**limits):
        shutil.rmtree(data.latents, ignore_errors=True)
        limited = dataclasses.replace(config, data=dataclasses.replace(data, **limits))
        try:
            encode(limited, data.latents)
        except UserError as error:
            return str(error)
        with open(os.path.join(data.latents, "summary.json")) as file:
            return json.load(file)["left_out"]

    assert left_out(prompt_length=200, answer_length=300) == []
    assert "has no pictures to draw" in left_out(prompt_length=20, answer_length=300)
    assert "has no pictures to draw" in left_out(prompt_length=200, answer_length=20)
    limit = len(Pretrained.open(vlm).encoder.unconditional().input_ids) + 20
    some = left_out(prompt_length=limit, answer_length=300)
    assert 0 < len(some) < 12 and all(f"more than the config's limit of {limit}" in line for line in some)


def test_what_is_too_long_does_not_count_and_is_encoded_when_the_limit_is_raised(config, tmp_path):
    """Until then neither its caption nor its number of images. Also in a directory of an earlier version, which does
    not know why a record was left out."""

    def edit(lines):
        lines[5].update(text="long " * 200, prompt_images=["000.jpg", "001.jpg"])

    rewrite(config, edit)
    tokenizers.save(tokenizers.train(["a flower"], 384), epath.Path(tmp_path / "tokenizer"))
    tokenizer = dataclasses.replace(config.tokenizer, path=str(tmp_path / "tokenizer"))
    data = dataclasses.replace(config.data, latents=str(tmp_path / "out"), prompt_length=200, answer_length=300)
    images = dataclasses.replace(config.images, most_unreadable=1)
    short = dataclasses.replace(config, tokenizer=tokenizer, data=data, images=images)
    long = dataclasses.replace(short, data=dataclasses.replace(data, prompt_length=2000))
    assert encode(short, data.latents)
    source = open_data(short)
    assert len(source.captions) == 13 and "a flower" in source.captions and source.most_images == 1
    assert not any("long " in text for text in source.texts())
    assert not any(changed(short, lambda: None).values())
    as_of_earlier_versions(short)
    assert len(changed(short, lambda: None)["latents"]) == 1
    assert len(changed(long, lambda: None)["latents"]) == 1
    source = open_data(long)
    assert not source.captions and source.most_images == 2 and any("long " in text for text in source.texts())
    assert not any(changed(long, lambda: None).values())


def test_the_summary_counts_what_is_there(config, capsys):
    def edit(lines):
        lines[0]["text"] = []
        lines[1]["questions"] = [{"question": "a?", "answer": ""}]

    shutil.copy(os.path.join(config.images.name, "003.jpg"), os.path.join(config.images.name, "006.jpg"))
    rewrite(config, edit)
    config = dataclasses.replace(config, images=dataclasses.replace(config.images, most_unreadable=1))
    assert encode(config, config.data.latents)
    printed = capsys.readouterr().out
    with open(os.path.join(config.data.latents, "summary.json")) as file:
        summary = json.load(file)
    pictures_there = summary["train"]["pictures"] + summary["test"]["pictures"]
    assert pictures_there == 10 and summary["left_out"] == ["001.jpg: an answer is empty"]
    assert [summary[split]["duplicate_pictures"] for split in ("train", "test")] == [1, 0]
    assert summary["train"]["prompts"]["count"] == 2 * summary["train"]["pictures"]
    assert "left out: 1, for instance: 001.jpg: an answer is empty" in printed
    sheet = np.asarray(Image.open(os.path.join(config.data.latents, "contact_sheet.png")))
    assert sheet.shape[2] == 3 and sheet.std() > 10


def test_the_summary_counts_what_training_with_its_own_tokenizer_will_refuse(config, capsys):
    def summarized(**limits):
        limited = dataclasses.replace(config, data=dataclasses.replace(config.data, **limits))
        assert encode(limited, config.data.latents)
        with open(os.path.join(config.data.latents, "summary.json")) as file:
            summary = json.load(file)
        return limited, summary["train"]["with_template"], capsys.readouterr().out

    *_, first, _ = summarized(prompt_length=200, answer_length=300)
    longest = {key: figures["longest"] for key, figures in first.items()}
    assert all(figures == {"longest": longest[key], "too_long": 0} for key, figures in first.items())
    shorter, second, printed = summarized(prompt_length=200, answer_length=longest["answer_length"] - 1)
    assert second["prompt_length"] == first["prompt_length"]
    assert second["answer_length"]["too_long"] > 0 and "that are longer than data.answer_length" in printed
    source = open_data(shorter)
    encoder = prompt_encoder(shorter, tokenizers.train(source.texts(), shorter.tokenizer.vocab_size))
    with pytest.raises(UserError, match=f"has {longest['answer_length']} tokens, more than the config's limit"):
        check_lengths(shorter, encoder, source)
