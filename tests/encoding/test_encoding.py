"""Pictures to latents on disk, and reading them in training: exact, resumable, and refused if something differs."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from lattejax.data import latents
from lattejax.data.digits import DigitSource
from lattejax.data.examples import image_batcher
from lattejax.data.images import square
from lattejax.data.pipeline import Batches, every
from lattejax.encoding import encode as encoding
from lattejax.encoding.encode import encode
from lattejax.encoding.pictures import open_pictures
from lattejax.errors import UserError
from lattejax.leases import one_writer
from lattejax.runs.data import open_data
from lattejax.sampling.images import decode_images
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


def test_pixels_in_colour_are_their_own_latents(config, tmp_path):
    """Exactly: they decode to the pictures' crops."""
    latent_shape = (pictures.SIZE, pictures.SIZE, 3)
    colours = change(config, "data", autoencoder="pixels", latent_shape=latent_shape, latents=str(tmp_path / "out"))
    colours = change(colours, "model", patch_size=4)
    encode(colours, colours.data.latents)
    drawings, stored = open_data(colours).drawings("test"), StoredAutoencoder.open_for(colours.data)
    made = decode_images(stored.autoencoder, {}, np.stack([drawing.latents for drawing in every(drawings)])[::2])
    crops = [square(picture.image, pictures.SIZE) for picture in open_pictures(colours.images, "test")]
    np.testing.assert_array_equal(made, crops)


def test_records_are_the_scaled_latents_of_the_crops_and_of_their_mirror_images(config):
    stored = StoredAutoencoder.open(config.data.autoencoder)
    weights, encoded = stored.weights("encoder"), jax.jit(stored.autoencoder.encode)
    source = open_data(config)
    assert source.captions == ("a flower", "a temple in China") and stored.identity.scale == 0.25
    for split, count in (("train", COUNT - 4), ("test", 4)):
        records, shown = list(every(source.drawings(split))), open_pictures(config.images, split)
        assert len(records) == 2 * count
        crops = np.stack([square(shown[i].image, pictures.SIZE) for i in range(count)])
        views = np.stack([crops, crops[:, :, ::-1]], axis=1).reshape(-1, *crops.shape[1:])
        expected = encoded(weights, views.astype(np.float32) / 127.5 - 1)
        np.testing.assert_allclose(np.stack([r.latents for r in records]), expected, rtol=1e-4, atol=1e-5)
        assert [r.caption for r in records] == [shown[i].caption for i in range(count) for _ in range(2)]


def test_cached_digits_are_the_digits(tmp_path):
    config = tiny_config(data__source="latents", data__latents=str(tmp_path / "latents"), **WITHOUT_SCORES)
    encode(config, config.data.latents)
    encoder = encoder_for(config)
    for split in ("train", "test"):
        cached = every(open_data(config).drawings(split, encoder))
        for ours, theirs in zip(cached, every(DigitSource("captions").drawings(split, encoder)), strict=True):
            assert ours.caption == theirs.caption
            np.testing.assert_allclose(ours.latents, theirs.latents, atol=1e-6)


WITHOUT_SCORES = NO_SCORES | dict(pretrain__steps=0)


def test_the_manifest_has_every_file_and_the_encoding_settings(config):
    manifest = json.loads((open_data(config).directory / "manifest.json").read_text())
    assert [shard["records"] for shard in manifest["shards"]] == [12, 12, 10, 8]
    assert manifest["encoding"]["autoencoder"]["scale"] == 0.25
    assert manifest["encoding"]["crop"] == "ADM centre crop" and manifest["encoding"]["flip"]
    assert len({shard["sha256"] for shard in manifest["shards"]}) == 4


# ---- Resuming


def test_a_killed_worker_resumes_at_its_file_and_several_workers_equal_one(config, tmp_path, monkeypatch):
    """The resulting directory is the same, and no picture of a complete file is encoded again."""
    out, expected = tmp_path / "latents", contents(open_data(config).directory)
    write, encoded = encoding._write_shard, []

    def killed(out, config, pictures, file, *rest):
        if len(encoded) == 1:
            (out / f"{file.name}.partial-0").write_bytes(b"begun")
            raise KeyboardInterrupt
        encoded.append(file.name)
        return write(out, config, pictures, file, *rest)

    monkeypatch.setattr(encoding, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(config, out)
    with pytest.raises(UserError, match=r"no manifest\.json; complete it with lattejax\.encode"):
        open_data(change(config, "data", latents=str(out)))
    monkeypatch.setattr(encoding, "_write_shard", lambda *rest: encoded.append(rest[3].name) or write(*rest))
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
    """Also if the files differ, here by compression. Other captions are other data."""
    again = change(config, "data", latents=str(tmp_path / "again"))
    monkeypatch.setattr(latents, "WRITER_OPTIONS", "group_size:1,brotli:9")
    encode(again, again.data.latents)
    ours, theirs = open_data(again), open_data(config)
    assert ours.identities[0] == theirs.identities[0] and ours.identities[1] != theirs.identities[1]
    record = {"latents": np.zeros((2, 2, 8), np.float32), "picture": "a.jpg"}
    first, second, renamed = (
        latents.write_records(epath.Path(tmp_path / "file"), (2, 2, 8), [record | change])[1]
        for change in ({"caption": "a cat"}, {"caption": "a dog"}, {"caption": "a cat", "picture": "b.jpg"})
    )
    assert first != second and first == renamed


# ---- Refused inputs


@pytest.mark.parametrize(
    "section, changes, named",
    [
        ("images", dict(flip=False), "flip: True -> False"),
        ("images", dict(test="train[:3]"), "images: .*pictures: "),
        ("images", dict(train="train[5:]"), "images: "),
        ("data", dict(image_size=32, latent_shape=(4, 4, 8)), "image_size: 16 -> 32"),
    ],
)
def test_latents_of_another_config_are_refused(section, changes, named, config):
    with pytest.raises(UserError, match=f"holds other latents.*{named}"):
        encode(change(config, section, **changes), config.data.latents)
    if section == "data":
        with pytest.raises(UserError, match=r"config\.data\.image_size=32, but .* was made with 16"):
            open_data(change(config, section, **changes))


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
    file = open_data(config).directory / "latents-train.array_record-00001-of-00003"
    complete = file.read_bytes()
    file.write_bytes(complete[:-100])
    for refused in (lambda: open_data(config), lambda: encode(config, config.data.latents)):
        with pytest.raises(UserError, match=f"{file.name} is truncated"):
            refused()
    file.write_bytes(complete[:-1] + b"x")
    with pytest.raises(UserError, match=f"{file.name} has changed since"):
        encode(config, config.data.latents)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing"):
        open_data(config)
    file.with_name(f"{file.name}.json").unlink()  # as the error message asks
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
    with pytest.raises(UserError, match=r"2 pictures cannot be read, more than .*most_unreadable=1: .*00\d\.jpg"):
        encode(config, config.data.latents)
    patient = change(config, "images", most_unreadable=2)
    assert encode(patient, config.data.latents)
    assert capsys.readouterr().out.count("skipped: the image 00") == 2
    manifest = json.loads((open_data(config).directory / "manifest.json").read_text())
    assert sum(len(shard["unreadable"]) for shard in manifest["shards"]) == 2
    assert count_records(config) == 10

    # Too many were unreadable before; once one is repaired, it is encoded.
    pictures.pieces(8)[7][2].save(path / "007.jpg")
    assert encode(config, config.data.latents)
    assert count_records(config) == 11


def count_records(config):
    return sum(len(open_data(config).drawings(split)) for split in ("train", "test"))


def test_a_file_whose_pictures_are_all_unreadable_is_empty(autoencoder, tmp_path):
    path = pictures.folder(tmp_path / "mine", 7)
    config = pictures.config(path, autoencoder, images__shard_pictures=1, images__most_unreadable=1)
    broken = open_pictures(config.images, "train")[1]
    (path / broken.name).write_text("no picture")
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
    stored = {drawing.latents.tobytes(): drawing.caption for drawing in every(source.drawings("train"))}
    for latent, index in zip(batch["latents"], batch["caption"], strict=True):
        assert source.captions[index] == stored[latent.tobytes()]
