"""Pictures to latents on disk, and reading them in training: exact, resumable, and refused if something differs."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

from lattejax.data import stored
from lattejax.data.digits import DigitSource
from lattejax.data.examples import image_batcher
from lattejax.data.images import square
from lattejax.data.pipeline import Batches, every
from lattejax.encoding import encode as encoding
from lattejax.encoding.encode import encode
from lattejax.errors import UserError
from lattejax.leases import one_writer
from lattejax.runs.data import open_data
from lattejax.sampling.images import decode_images
from lattejax.scoring.sources import open_latents
from lattejax.weights.autoencoders import StoredAutoencoder
from tests import checkpoints, pictures
from tests.helpers import NO_SCORES, assert_same_bits, encoder_for, tiny_config

COUNT = 21  # pieces: shards of 6, 6 and 5 to train on, one of 4 held out


@pytest.fixture(scope="module")
def autoencoder():
    return checkpoints.convert_autoencoder()


@pytest.fixture(scope="module")
def config(autoencoder, tmp_path_factory):
    """A config whose latents have been encoded, each picture twice."""
    path = pictures.folder(tmp_path_factory.mktemp("pictures") / "mine", COUNT)
    config = pictures.config(path, autoencoder, images__flip=True)
    assert encode(config, config.data.latents)
    return config


def change(config, section, **changes):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def contents(directory):
    return {name: (directory / name).read_bytes() for name in sorted(os.listdir(directory))}


def copy(config, tmp_path):
    return change(config, "data", latents=str(shutil.copytree(config.data.latents, tmp_path / "latents")))


# ---- Stored data


def test_the_texts_of_prompts_are_those_of_the_drawings(config):
    drawings = open_data(config).drawings("train")
    texts = [[prompt.caption for prompt in drawing.prompts] for drawing in every(drawings)]
    assert list(drawings.prompt_texts()) == texts


def numbers_of(config, split):
    """The numbers of the pieces in a split, in order."""
    files = (f"captions-{split}-{i:05d}.array_record" for i in range(9))
    return [
        int(json.loads(record)["name"].removesuffix(".jpg"))
        for file in files
        if os.path.exists(path := os.path.join(config.data.latents, file))
        for record in ArrayRecordDataSource(path).__getitems__(range(len(ArrayRecordDataSource(path))))
    ]


def crops_of(config, split):
    """The crops of the files in a split, in order."""
    folder = Path(config.images.name)
    opened = (Image.open(folder / f"{number:03d}.jpg") for number in numbers_of(config, split))
    return np.stack([square(image, pictures.SIZE) for image in opened])


def caption_of(drawing):
    (prompt,) = drawing.prompts
    return prompt.caption


def test_pixels_in_colour_are_their_own_latents(config, tmp_path):
    """Exactly: they decode to the pictures' crops."""
    latent_shape = (pictures.SIZE, pictures.SIZE, 3)
    colours = change(config, "data", autoencoder="pixels", latent_shape=latent_shape, latents=str(tmp_path / "out"))
    colours = change(colours, "model", patch_size=4)
    encode(colours, colours.data.latents)
    drawings, pixels = open_data(colours).drawings("test"), StoredAutoencoder.open_for(colours.data)
    made = decode_images(pixels.autoencoder, {}, np.stack([drawing.latents for drawing in every(drawings)])[::2])
    np.testing.assert_array_equal(made, crops_of(colours, "test"))


def test_records_are_the_scaled_latents_of_the_crops_and_of_their_mirror_images(config):
    dc_ae = StoredAutoencoder.open(config.data.autoencoder)
    weights, encoded = dc_ae.weights("encoder"), jax.jit(dc_ae.autoencoder.encode)
    source = open_data(config)
    assert source.captions == ("a flower", "a temple in China") and dc_ae.identity.scale == 0.25
    for split, count in (("train", COUNT - 4), ("test", 4)):
        records, crops = list(every(source.drawings(split))), crops_of(config, split)
        assert len(records) == 2 * count
        views = np.stack([crops, crops[:, :, ::-1]], axis=1).reshape(-1, *crops.shape[1:])
        expected = encoded(weights, views.astype(np.float32) / 127.5 - 1)
        np.testing.assert_allclose(np.stack([r.latents for r in records]), expected, rtol=1e-4, atol=1e-5)
        captions = [pictures.SUBJECTS[list(pictures.SUBJECTS)[i % 2]] for i in numbers_of(config, split)]
        assert [caption_of(r) for r in records] == [caption for caption in captions for _ in range(2)]


def test_a_reference_of_latents_has_each_picture_once_and_no_mirror_image(config):
    stored = StoredAutoencoder.open(config.data.autoencoder)
    latents = [drawing.latents for drawing in every(open_data(config).drawings("test"))]
    expected = decode_images(stored.autoencoder, stored.weights("decoder"), np.stack(latents[::2]))
    source = open_latents(config.data.latents, "test", config.data.autoencoder)
    assert source.shape[0] == 4
    np.testing.assert_allclose(source.read(np.arange(4)).astype(int), expected, atol=1)  # compiled for other batches
    mirrored = np.abs(expected[:, :, ::-1].astype(int) - expected)
    assert mirrored.max() > 1, "these would be noticed"


def test_cached_digits_are_the_digits(tmp_path):
    config = tiny_config(data__source="latents", data__latents=str(tmp_path / "latents"), **WITHOUT_SCORES)
    encode(config, config.data.latents)
    encoder = encoder_for(config)
    for split in ("train", "test"):
        cached, source = open_data(config), DigitSource("captions")
        pairs = (each.drawings(split, encoder) for each in (cached, source))
        for ours, theirs in zip(*map(every, pairs), strict=True):
            assert caption_of(ours) == caption_of(theirs)
            np.testing.assert_allclose(ours.latents, theirs.latents, atol=1e-6)
        ours, theirs = (each.questions(split, encoder) for each in (cached, source))
        assert len(ours) == len(theirs) and ours.bounds == theirs.bounds
        for index in (0, 1, 7, len(ours) - 1):
            assert ours.text(index) == theirs.text(index)
            assert_same_bits(ours.unanswered(index).input_ids, theirs.unanswered(index).input_ids)
            one, other = (each.__getitems__([index])[0] for each in (ours, theirs))
            assert_same_bits((one.input_ids, one.is_answer), (other.input_ids, other.is_answer))
            assert_same_bits(one.images[0].patches, other.images[0].patches)


WITHOUT_SCORES = NO_SCORES | dict(pretrain__steps=0)


def test_the_manifest_has_every_file_and_the_encoding_settings(config):
    manifest = json.loads((open_data(config).directory / "manifest.json").read_text())
    assert [shard["files"]["latents"]["records"] for shard in manifest["shards"]] == [12, 12, 10, 8]
    assert [shard["files"]["captions"]["records"] for shard in manifest["shards"]] == [6, 6, 5, 4]
    assert manifest["encoding"]["autoencoder"]["scale"] == 0.25
    assert manifest["encoding"]["crop"] == "ADM centre crop" and manifest["encoding"]["flip"]
    assert len({shard["files"]["latents"]["sha256"] for shard in manifest["shards"]}) == 4


# ---- Resuming


def test_a_killed_worker_resumes_at_its_file_and_several_workers_equal_one(config, tmp_path, monkeypatch):
    """The resulting directory is the same, and no picture of a complete file is encoded again."""
    out, expected = tmp_path / "latents", contents(open_data(config).directory)
    write, encoded = encoding.Job._write, []

    def killed(job, file, *rest):
        if len(encoded) == 1:
            (out / f"latents-{file.name}.array_record.partial-0").write_bytes(b"begun")
            raise KeyboardInterrupt
        encoded.append(file.name)
        return write(job, file, *rest)

    monkeypatch.setattr(encoding.Job, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(config, out)
    with pytest.raises(UserError, match=r"no manifest\.json; complete it with lattejax\.encode"):
        open_data(change(config, "data", latents=str(out)))
    monkeypatch.setattr(encoding.Job, "_write", lambda *rest: encoded.append(rest[1].name) or write(*rest))
    assert not encode(config, out, worker=1, workers=2)
    assert encode(config, out, worker=0, workers=2)
    assert len(encoded) == len(set(encoded)) == 4
    assert contents(out) == expected
    assert encode(config, out), "and once more, which only checks"
    assert len(encoded) == 4


def test_two_processes_of_one_number_do_not_write_together(config, tmp_path):
    with one_writer(tmp_path / "latents" / ".worker-0", "it"), pytest.raises(UserError, match="is being written by"):
        encode(config, tmp_path / "latents")
    assert not encode(config, tmp_path / "latents", worker=1, workers=2), "another number may"


def test_the_same_pictures_encoded_again_have_the_same_identity(config, tmp_path, monkeypatch):
    """Also if the files differ, here by compression. Other captions are other data, another file name is not."""
    again = change(config, "data", latents=str(tmp_path / "again"))
    monkeypatch.setattr(stored, "WRITER_OPTIONS", "group_size:1,brotli:9")
    encode(again, again.data.latents)
    ours, theirs = open_data(again), open_data(config)
    assert ours.identities[0] == theirs.identities[0] and ours.identities[1] != theirs.identities[1]
    first, second, renamed = (
        one_picture(config, tmp_path, *each) for each in (("a", "a cat"), ("a", "a dog"), ("b", "a cat"))
    )
    assert first != second and first == renamed


def one_picture(config, tmp_path, name, caption):
    """The identity of data with one picture in each split."""
    path = tmp_path / f"{name} {caption}"
    path.mkdir()
    for i, (_, _, image) in enumerate(pictures.pieces(2)):
        image.save(path / f"{name}{i}.png")
        (path / f"{name}{i}.txt").write_text(caption)
    images = dict(name=str(path), train="train[1:]", test="train[:1]")
    config = change(change(config, "images", **images), "data", latents=str(path / "latents"))
    encode(config, config.data.latents)
    return open_data(config).identities[0]


# ---- Refused inputs


@pytest.mark.parametrize(
    "section, changes, named",
    [
        ("images", dict(flip=False), "flip was True, is False"),
        ("images", dict(test="train[:3]"), r"test was train\[:4\], is train\[:3\]"),
        ("images", dict(train="train[5:]"), "train was "),
        ("data", dict(image_size=32, latent_shape=(4, 4, 8)), "image_size was 16, is 32"),
    ],
)
def test_latents_of_another_config_are_refused(section, changes, named, config):
    with pytest.raises(UserError, match=f"was encoded with other settings.*{named}.*; use another --out"):
        encode(change(config, section, **changes), config.data.latents)
    if section == "data":
        with pytest.raises(UserError, match=r"config\.data\.image_size=32, but .* was made with 16"):
            open_data(change(config, section, **changes))


def test_latents_must_be_named(config):
    with pytest.raises(UserError, match=r"config\.data\.latents is empty; it must be a directory that"):
        open_data(change(config, "data", latents=""))


@pytest.mark.parametrize("family, scale, named", [("in-1.0", 0.5, "scale 0.25 of"), ("sana-1.0", 0.25, "sha256")])
def test_latents_of_another_autoencoder_or_scale_are_refused(family, scale, named, config):
    other = change(config, "data", autoencoder=str(checkpoints.convert_autoencoder(family, scale)))
    with pytest.raises(UserError, match=named):
        open_data(other)


def test_shapes_that_the_autoencoder_does_not_make_are_refused(config, tmp_path):
    for changes, named in (
        (dict(latent_shape=(2, 2, 32)), r"makes \(2, 2, 8\) of image_size=16"),
        (dict(image_size=20), "image_size=20 is no multiple of 8"),
    ):
        with pytest.raises(UserError, match=named):
            encode(change(config, "data", **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_or_changed_shard_is_named(config, tmp_path):
    config = copy(config, tmp_path)
    file = open_data(config).directory / "latents-train-00001.array_record"
    complete = file.read_bytes()
    file.write_bytes(complete[:-100])
    for refused in (lambda: open_data(config), lambda: encode(config, config.data.latents)):
        with pytest.raises(UserError, match=f"{file.name} is truncated"):
            refused()
    file.write_bytes(complete[:-1] + b"x")
    with pytest.raises(UserError, match=f"{file.name} has changed since"):
        encode(config, config.data.latents)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing; remove train-00001.json and encode again"):
        open_data(config)
    file.with_name("train-00001.json").unlink()  # as the error message asks
    assert encode(config, config.data.latents)
    assert file.read_bytes() == complete and len(list(every(open_data(config).drawings("train")))) == 34


def test_a_directory_of_other_files_is_not_written_to(config, tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="not empty"):
        encode(config, tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_unreadable_pictures_are_counted_and_named_up_to_a_limit(autoencoder, tmp_path, capsys):
    path = pictures.folder(tmp_path / "mine", 12)
    (path / "003.jpg").write_bytes((path / "003.jpg").read_bytes()[:300])  # truncated
    (path / "007.jpg").write_text("no picture")
    config = pictures.config(path, autoencoder, images__most_unreadable=1)
    with pytest.raises(UserError, match=r"2 records cannot be used, more than .*most_unreadable=1: .*00\d\.jpg"):
        encode(config, config.data.latents)
    patient = change(config, "images", most_unreadable=2)
    assert encode(patient, config.data.latents)
    assert len(re.findall(r"skipped: (00\d\.jpg): the image \1", capsys.readouterr().out)) == 2
    manifest = json.loads((open_data(config).directory / "manifest.json").read_text())
    assert sum(len(shard["left_out"]) for shard in manifest["shards"]) == 2
    assert count_records(config) == 10

    # Too many were unreadable before; once one is repaired, it is encoded.
    pictures.pieces(8)[7][2].save(path / "007.jpg")
    assert encode(config, config.data.latents)
    assert count_records(config) == 11


def shuffled(path, count):
    """The names of a folder's pictures in the order of encoding, of which the first four are held out."""
    names = sorted(file for file in os.listdir(path) if file.endswith(".jpg"))
    return [names[i] for i in np.random.default_rng(0).permutation(count)]


def count_records(config):
    return sum(len(open_data(config).drawings(split)) for split in ("train", "test"))


def test_a_file_whose_pictures_are_all_unreadable_is_empty(autoencoder, tmp_path):
    path = pictures.folder(tmp_path / "mine", 7)
    config = pictures.config(path, autoencoder, images__shard_pictures=1, images__most_unreadable=1)
    (path / shuffled(path, 7)[5]).write_text("no picture")
    assert encode(config, config.data.latents)
    drawings = open_data(config).drawings("train")
    assert len(drawings) == len(list(every(drawings))) == 2


# ---- Reading in training


def stream(config, seed=0, rows=None):
    source, encoder = open_data(config), encoder_for(config)
    batcher = image_batcher(config, encoder, source.captions)
    drawings = source.drawings("train", encoder)
    return Batches(drawings, batcher, batch_size=8, seed=seed, threads=2, rows=rows)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("shared", [True, False])
def test_two_runs_with_one_seed_read_the_same_batches_and_a_stopped_one_resumes(shared, config):
    config = change(config, "train", share_contexts=shared)
    one = take(stream(config), 9)
    assert_same_bits(take(stream(config), 9), one)
    assert not np.array_equal(next(stream(config, seed=1))["latents"], one[0]["latents"])
    for stop in (0, 1, 4):
        stopped = stream(config)
        take(stopped, stop)
        state = json.loads(json.dumps(stopped.get_state()))
        resumed = stream(config)
        resumed.set_state(state)
        assert_same_bits(take(resumed, 4), one[stop : stop + 4])


def test_hosts_read_parts_of_one_batch_and_resume_with_another_number_of_hosts(config):
    """For any rows; and a batch's records can be listed afterwards."""
    complete = take(stream(config), 6)
    two = [(rows, stream(config, rows=rows)) for rows in ([0, 1, 4, 5], [2, 3, 6, 7])]
    for batch in complete[:3]:
        for rows, part in two:
            assert_same_bits(next(part), jax.tree.map(lambda x, rows=rows: x[rows], batch))
    four = [(rows, stream(config, rows=rows)) for rows in ([0, 4], [1, 5], [2, 6], [3, 7])]
    for rows, part in four:
        part.set_state(two[0][1].get_state())
        for batch in complete[3:]:
            assert_same_bits(next(part), jax.tree.map(lambda x, rows=rows: x[rows], batch))
    drawings = open_data(config).drawings("train", encoder_for(config))
    named = drawings.__getitems__(stream(config).records(4))
    assert_same_bits(np.stack([drawing.latents for drawing in named]), complete[4]["latents"])


def test_caption_indices_point_into_the_table(config):
    source, batch = open_data(config), next(stream(config))
    known = {drawing.latents.tobytes(): caption_of(drawing) for drawing in every(source.drawings("train"))}
    for latent, index in zip(batch["latents"], batch["caption"], strict=True):
        assert source.captions[index] == known[latent.tobytes()]
