"""Published scores: sets that resume, files that ADM's evaluator shares, results that say what they are."""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import shutil
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

import lattejax
from lattejax.data.examples import Drawing, Prompt
from lattejax.data.images import square
from lattejax.errors import UserError
from lattejax.evaluation.adm import ReferenceFile, SampleFile, write_reference, write_samples
from lattejax.evaluation.frechet import Gaussian, frechet_distance
from lattejax.evaluation.precision_recall import precision_recall
from lattejax.evaluation.sample_sets import Asked, SetDrawer
from lattejax.files import resolve_path
from lattejax.flow.schedule import Sampling
from lattejax.models import latte_flow, qwen2_vl
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.inception import CLASSES, POOL, SPATIAL
from lattejax.models.pixels import PixelConfig
from lattejax.sampling.images import ImageSampler
from lattejax.scoring import parts as parts_of_sets
from lattejax.scoring import points as points_of_sets
from lattejax.scoring.parts import Parts, computed_on
from lattejax.scoring.points import Point, _only_a_monitor_because, score_points
from lattejax.scoring.reference import make_reference
from lattejax.scoring.sources import open_folder, open_reference_source, open_samples
from lattejax.scoring.table import write_table
from tests.helpers import encoder_for, randomize, tiny_config
from tests.pixel_features import PixelFeatures, random_pictures

CONFIG = tiny_config()
ENCODER = encoder_for(CONFIG)
# There are fewer pictures than features, and the root of a singular covariance enlarges float64's rounding: another
# order of the pictures alone makes 2e-9.
FID = 1e-7
PROMPTS = [f"a handwritten {digit}" for digit in ("seven", "two", "four")]


@pytest.fixture(scope="module")
def sampler() -> ImageSampler:
    model = CONFIG.model_config
    params = latte_flow.init(model, qwen2_vl.init(model.vlm, jax.random.key(0)), jax.random.key(1))
    return ImageSampler(model, Autoencoder(PixelConfig()), ENCODER, latte_flow.unstack(randomize(params, 2, 0.1)), {})


def drawer(sampler: ImageSampler, batch_size: int = 16, guidance: float = 2.0) -> SetDrawer:
    asked = Asked.texts(ENCODER, PROMPTS, "a test")
    return SetDrawer(sampler, asked, Sampling(3, guidance), batch_size=batch_size, seed=5)


def point(read, total: int, guidance: float = 2.0, **settings) -> Point:
    settings = {"num": total, "guidance": guidance, "num_steps": 3} | settings
    return Point(f"guidance_{guidance:g}", settings, (total, 8, 8, 3), lambda: read)


REFERENCE_PICTURES = random_pictures(60)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> ReferenceFile:
    directory = tmp_path_factory.mktemp("reference")
    np.savez(directory / "pictures.npz", arr_0=REFERENCE_PICTURES)
    out = directory / "reference.npz"
    source = open_samples(str(directory / "pictures.npz"), 25, None)
    make_reference(source, resolve_path(out), PixelFeatures(), pictures=20, part=25)
    return ReferenceFile.open(str(out))


def score(points, reference, out, part=16, keep_pictures=True):
    return score_points(points, reference, PixelFeatures(), resolve_path(out), part=part, keep_pictures=keep_pictures)


# ---- Sets


def test_a_set_that_is_interrupted_is_the_set_that_was_not(sampler, reference, tmp_path):
    """200 drawings, stopped six times while they are drawn or judged; each time the finished parts stay."""
    total, draw = 200, drawer(sampler)
    [expected] = score([point(draw, total)], reference, tmp_path / "whole.json")
    drawn, stops = [], [0, 48, 48, 96, 160, 192]

    class Stopped(Exception):
        pass

    def interrupted(samples: np.ndarray) -> np.ndarray:
        drawn.extend(samples.tolist())
        if stops and samples[0] == stops[0]:
            del stops[0]
            raise Stopped
        return draw(samples)

    for _ in itertools.count():
        try:
            [result] = score([point(interrupted, total)], reference, tmp_path / "parts.json")
            break
        except Stopped:
            assert (tmp_path / "parts.json.parts").is_dir() and not (tmp_path / "parts.json").exists()
    assert not stops and len(drawn) == total + 5 * 16 + 8, "each stopped part again, and nothing else"
    assert result == expected
    assert (tmp_path / "parts_guidance_2.npz").read_bytes() == (tmp_path / "whole_guidance_2.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if "parts" in path.name) == [
        "parts.json",
        "parts_guidance_2.npz",
    ]


def test_a_set_does_not_depend_on_its_batches(sampler):
    samples = np.arange(3, 12)
    expected = drawer(sampler)(samples).astype(int)
    assert np.abs(drawer(sampler, 4)(samples) - expected).max() <= 1
    assert np.abs(drawer(sampler)(samples[5:]) - expected[5:]).max() <= 1


def test_sample_i_has_prompt_i_and_noise_i(sampler):
    """Equal to the sampler's own set of the same prompt: sample i of it has noise i too."""
    samples = np.arange(9)
    drawn = drawer(sampler)(samples).astype(int)
    for which, text in enumerate(PROMPTS[:2]):
        own = sampler([ENCODER.drawing(text)], Sampling(3, 2.0), images_per_prompt=9, batch_size=9, seed=5)
        assert np.abs(own[which::3] - drawn[which::3]).max() <= 1


def test_the_prompts_of_data_are_all_its_captions_or_those_of_held_out_pictures():
    class Drawings:
        def __len__(self):
            return 4

        def __getitems__(self, rows):
            return [Drawing(np.zeros(1), (Prompt(f"a {row}"), Prompt("another"))) for row in rows]

    source = types.SimpleNamespace(captions=tuple(PROMPTS), identities=("x",), drawings=lambda *_: Drawings())
    listed = Asked.of_data(CONFIG, source, ENCODER)
    assert listed.count == 3
    assert listed.encode([2])[0].input_ids.tolist() == ENCODER.drawing(PROMPTS[2]).input_ids.tolist()
    source.captions = ()
    held_out = Asked.of_data(CONFIG, source, ENCODER)
    assert (held_out.count, held_out.what) == (4, "the captions of held-out pictures")
    assert held_out.encode([3])[0].input_ids.tolist() == ENCODER.drawing("a 3").input_ids.tolist()


def test_the_hash_of_prompts_is_of_what_the_model_reads():
    """The same texts by another tokenizer are other prompts; those that no sample has do not count."""
    asked = Asked.texts(ENCODER, PROMPTS, "a test")
    other = dataclasses.replace(asked, encode=lambda rows: [ENCODER.drawing(f"{PROMPTS[row]}!") for row in rows])
    assert asked.encoded_identity(3) == Asked.texts(ENCODER, PROMPTS, "").encoded_identity(3)
    assert other.identity == asked.identity and other.encoded_identity(3) != asked.encoded_identity(3)
    assert asked.encoded_identity(2) == Asked.texts(ENCODER, PROMPTS[:2], "").encoded_identity(2)


# ---- Results


def test_a_sweep_has_a_table_and_two_plots_and_adds_what_is_missing(sampler, reference, tmp_path):
    out, drawn = tmp_path / "scores.json", []

    def counted(guidance):
        draw = drawer(sampler, guidance=guidance)

        def read(samples):
            parts = (tmp_path / "scores.json.parts").iterdir()
            assert {path.name for path in parts} == {"reference", f"guidance_{guidance:g}"}, "one set at a time"
            drawn.append(guidance)
            return draw(samples)

        return read

    def points(*scales):
        return [point(counted(scale), 12, scale) for scale in scales]

    score(points(1.0), reference, out, keep_pictures=False)
    results = score(points(2.0, 1.0, 4.0), reference, out, keep_pictures=False)
    assert drawn == [1.0, 2.0, 4.0], "that of guidance 1 is there already"
    assert [result["settings"]["guidance"] for result in results] == [2.0, 1.0, 4.0]
    assert len(json.loads(out.read_text())["results"]) == 3 and not list(tmp_path.glob("*.npz"))
    table = write_table(resolve_path(out), results)
    assert table == (tmp_path / "scores.md").read_text()
    assert table.startswith("| guidance | steps | fid | sfid | inception score | precision | recall |")
    assert f"| 2 | 3 | {results[0]['figures']['fid']:.4g} |" in table
    assert [line[:5] for line in table.splitlines()[2:5]] == ["| 1 |", "| 2 |", "| 4 |"]
    assert "Only a monitor: 12 pictures, not 50,000; the Inception weights are not the published ones; " in table
    for name in ("guidance", "steps"):
        assert Image.open(tmp_path / f"scores_by_{name}.png").width > 1000
    with pytest.raises(UserError, match="has the scores of guidance_2 already, whose pictures were not kept; to draw"):
        score(points(2.0), reference, out, keep_pictures=True)
    with pytest.raises(UserError, match=r"results of other settings \(seed: None -> 1\); choose another --out"):
        score([point(counted(1.0), 12, 1.0, seed=1)], reference, out)


def test_only_the_first_process_reads_earlier_results(tmp_path, monkeypatch):
    """The others may not see the file yet, or see an old one on their network disk."""
    calls = []
    monkeypatch.setattr(points_of_sets.hosts, "is_first", lambda: False)
    monkeypatch.setattr(points_of_sets.hosts, "from_first", lambda found: calls.append(found.tolist()) or ~found)
    (tmp_path / "a.json").write_text("half a fi")
    reference = types.SimpleNamespace(sha256="")
    assert score([point(None, 30), point(None, 30, 4.0)], reference, tmp_path / "a.json") == []
    assert calls == [[False, False]]


def test_a_result_is_what_its_pictures_give_and_names_what_determined_it(reference, tmp_path):
    pictures = random_pictures(30, 1) // 2 + 64  # of less contrast than the reference's, so that recall is low
    [result] = score([point(lambda rows: pictures[rows], 30)], reference, tmp_path / "a.json")
    ours, theirs = (PixelFeatures()(images) for images in (pictures, REFERENCE_PICTURES))
    figures = result["figures"]
    assert figures["fid"] == pytest.approx(frechet_distance(ours.pool, theirs.pool), rel=FID)
    assert figures["sfid"] == pytest.approx(frechet_distance(ours.spatial, theirs.spatial), rel=FID)
    kept = np.sort(np.random.default_rng(0).permutation(60)[:20])  # of the reference's pictures
    found = precision_recall([ours.pool], [theirs.pool[kept]])
    assert (figures["precision"], figures["recall"]) == pytest.approx(tuple(found)) and found[0] != found[1]
    likely = softmax(ours.logits.astype(np.float64), axis=1).reshape(10, 3, -1)  # of the pictures in ten splits
    divergences = np.sum(likely * np.log(likely / likely.mean(axis=1, keepdims=True)), axis=2).mean(axis=1)
    assert figures["inception_score"] == pytest.approx(np.exp(divergences).mean(), rel=1e-5)
    assert set(figures) == {"fid", "sfid", "inception_score", "precision", "recall"}
    assert result["settings"]["reference_sha256"] == reference.sha256
    assert result["settings"]["inception_sha256"] == "of pixels"
    description = result["reference"]["description"]
    assert description["pictures_sha256"] == hash_of_pictures(REFERENCE_PICTURES) and description["num"] == 60
    assert result["reference"]["pictures"] == 20
    assert result["shape"] == [30, 8, 8, 3] and result["distances"] == "float32"
    assert "cpu" in result["device"] and "highest" in result["inception_precision"]
    assert np.load(tmp_path / "a_guidance_2.npz")["arr_0"].tobytes() == pictures.tobytes()
    [same] = score([point(lambda rows: REFERENCE_PICTURES[rows], 60)], reference, tmp_path / "same.json")
    assert result["figures"]["fid"] > 100 * abs(same["figures"]["fid"])


def test_too_few_pictures_and_other_parts_are_refused(reference, tmp_path):
    pictures = random_pictures(30)
    with pytest.raises(UserError, match="9 pictures are too few to score; at least 10"):
        score([point(lambda rows: pictures[rows], 9)], reference, tmp_path / "a.json")

    def stopped(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score([point(stopped, 30)], reference, tmp_path / "a.json")
    with pytest.raises(UserError, match="parts of another set, with another num, total, kept; remove it"):
        score([point(stopped, 20)], reference, tmp_path / "a.json", part=16)


def hash_of_pictures(pictures: np.ndarray) -> str:
    digests = [hashlib.sha256(picture.tobytes()).digest() for picture in pictures]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def test_what_must_not_be_published_says_why(reference, tmp_path):
    published = types.SimpleNamespace(weights=types.SimpleNamespace(sha256="67", are_published=True))
    settings = {"prompts": "all captions of the data", "num_prompts": 1000}
    drawn = Point("", settings, (50_000, 256, 256, 3), None)
    pictures = SampleFile(None, (10_000, 256, 256, 3))
    adms = dataclasses.replace(reference, pictures=pictures, description={})

    def reasons(point=drawn, **changes) -> str:
        return "; ".join(_only_a_monitor_because(point, published, dataclasses.replace(adms, **changes)))

    def of(num=50_000, side=256, **changes) -> Point:
        return Point("", settings | changes, (num, side, side, 3), None)

    assert reasons() == reasons(Point("", {}, drawn.shape, None)) == ""
    assert reasons(of(num=49_999)).startswith("49,999 pictures, not 50,000; 49,999 pictures are not the same number")
    assert reasons(of(num_prompts=999)) == "50,000 pictures are not the same number for each of 999 prompts"
    assert reasons(of(prompts="a file")) == "the prompts are those of a file, not of the data"
    assert reasons(of(side=128)) == "pictures of 128x128 pixels, a reference of 256x256"
    few = SampleFile(None, (50, 256, 256, 3))
    assert reasons(pictures=few) == "precision and recall are against 50 pictures, not 10,000"
    other = {"inception_sha256": "01" * 32}
    assert reasons(description=other) == "the reference was made with other Inception weights (0101010101010101)"
    assert reasons(pictures=None) == reasons(description={"inception_sha256": "67"}) == ""
    assert "only mu and sigma, as of pytorch-fid" in reasons(spatial=None, pictures=None)


def test_all_devices_and_versions_that_made_a_set_are_named(tmp_path, monkeypatch):
    def killed(rows):
        if rows[0]:
            raise KeyboardInterrupt
        return np.zeros((len(rows), 8, 8, 3), np.uint8)

    earlier = {"device": "8 x tpu", "lattejax_version": "0.0.9", "jax_version": jax.__version__}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts_of_sets, "computed_on", lambda: earlier)
        filled(tmp_path / "a", 0, seed=1, read=killed)
    found = filled(tmp_path / "a", 0, seed=1).computed_on
    assert found["device"] == f"8 x tpu; {computed_on()['device']}" and found["jax_version"] == jax.__version__
    assert found["lattejax_version"] == f"0.0.9; {lattejax.__version__}"


def filled(directory, level: int, seed: int, read=None) -> Parts:
    """A set of 30 pictures of one grey level, in two parts."""
    pictures, every = np.full((30, 8, 8, 3), level, np.uint8), np.ones(30, bool)
    parts = Parts.open(resolve_path(directory), {"seed": seed}, part=16, kept=every, picture=(8, 8, 3))
    parts.fill(read or (lambda rows: pictures[rows]), PixelFeatures(), "a test")
    return parts


def levels(parts: Parts) -> set[int]:
    return set(np.unique(np.concatenate(list(parts.pictures()))).tolist())


@pytest.mark.parametrize("gone", [["set.json"], ["00001.npz"], ["set.json", "00000.npz"], []], ids="+".join)
def test_parts_of_a_set_whose_removal_was_killed_are_not_taken_for_another(gone, tmp_path, monkeypatch):
    black = filled(tmp_path / "a", 0, seed=1)

    def killed(path):
        for name in gone:
            os.unlink(os.path.join(path, name))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        black.remove()
    assert levels(filled(tmp_path / "a", 255, seed=2)) == {255}
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "what the killed removal has left is removed"


def test_parts_without_their_set_or_of_other_settings_are_made_again(tmp_path):
    filled(tmp_path / "a", 0, seed=1)
    (tmp_path / "a" / "set.json").unlink()
    assert levels(filled(tmp_path / "a", 255, seed=2)) == {255}
    text = (tmp_path / "a" / "set.json").read_text()
    (tmp_path / "a" / "set.json").write_text(text.replace('"seed": 2', '"seed": 3'))
    assert levels(filled(tmp_path / "a", 7, seed=3)) == {7}
    assert levels(filled(tmp_path / "a", 8, seed=3)) == {7}, "and not again"


def test_a_set_needs_room_for_its_features_and_for_its_pictures_twice(tmp_path, monkeypatch):
    wanted = []
    monkeypatch.setattr(parts_of_sets, "check_space", lambda path, size, name: wanted.append(size))
    filled(tmp_path / "a", 0, seed=1)
    assert wanted == [30 * (4 * (POOL + SPATIAL + CLASSES) + 2 * 8 * 8 * 3)]


# ---- Files of ADM's evaluator


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
def test_sample_files_are_read_in_blocks(save, tmp_path):
    pictures = random_pictures(11)
    save(tmp_path / "samples.npz", other=np.ones(3), arr_0=pictures)
    file = SampleFile.open(str(tmp_path / "samples.npz"))
    assert file.shape == (11, 8, 8, 3)
    for size in (4, 11, 100):
        assert np.array_equal(np.concatenate(list(file.blocks(size))), pictures)
    source = open_samples(str(tmp_path / "samples.npz"), 4, 9)
    assert np.array_equal(source.read(np.arange(4, 8)), pictures[4:8]), "the first part was there already"
    assert np.array_equal(source.read(np.arange(8, 9)), pictures[8:9])
    with pytest.raises(UserError, match=r"--num=12, but .* has 11 pictures"):
        open_samples(str(tmp_path / "samples.npz"), 4, 12)


@pytest.mark.skipif(sys.platform != "linux", reason="open files are listed in /proc")
def test_a_sample_file_is_closed_after_the_last_picture_that_is_read(tmp_path):
    file = tmp_path / "samples.npz"
    np.savez(file, arr_0=random_pictures(11))

    def is_open() -> bool:
        return str(file) in [os.path.realpath(each.path) for each in os.scandir("/proc/self/fd")]

    source, found = open_samples(str(file), 4, 9), []
    for rows in (np.arange(4), np.arange(4, 8), np.arange(8, 9)):
        assert len(source.read(rows)) == len(rows)
        found.append(is_open())
    assert found == [True, True, False]


def test_files_are_written_as_numpy_reads_them_and_always_the_same(tmp_path):
    pictures, paths = random_pictures(7), [resolve_path(tmp_path / name) for name in ("a.npz", "b.npz")]
    for path, blocks in zip(paths, ([pictures], [pictures[:3], pictures[3:]]), strict=True):
        write_samples(path, pictures.shape, blocks)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert np.array_equal(np.load(paths[0])["arr_0"], pictures)
    with pytest.raises(ValueError, match="3 pictures were written, not 7"):
        write_samples(resolve_path(tmp_path / "c.npz"), pictures.shape, [pictures[:3]])
    assert sorted(tmp_path.iterdir()) == paths


def test_a_reference_file_has_the_layout_of_adms(reference):
    with np.load(reference.path) as arrays:
        assert set(arrays.files) == {"mu", "sigma", "mu_s", "sigma_s", "arr_0", "description"}
        pool, pictures = PixelFeatures()(REFERENCE_PICTURES).pool, arrays["arr_0"]
        np.testing.assert_allclose(arrays["mu"], pool.mean(axis=0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(arrays["sigma"], np.cov(pool, rowvar=False), rtol=1e-4, atol=1e-7)
    kept = sorted(np.random.default_rng(0).permutation(60)[:20])
    assert np.array_equal(pictures, REFERENCE_PICTURES[kept]), "a fixed choice, in its order"


def test_a_reference_without_some_parts_leaves_out_their_scores(reference, tmp_path):
    """pytorch-fid's files have mu and sigma alone; a sample file has pictures alone, and gives all."""
    pictures = random_pictures(30, 1)
    points = [point(lambda rows: pictures[rows], 30)]
    with np.load(reference.path) as arrays:
        np.savez(tmp_path / "pytorch_fid.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    [result] = score(points, ReferenceFile.open(str(tmp_path / "pytorch_fid.npz")), tmp_path / "a.json")
    assert set(result["figures"]) == {"fid", "inception_score"}
    assert set(result["left_out"]) == {"sfid", "precision", "recall"}
    np.savez(tmp_path / "samples.npz", arr_0=REFERENCE_PICTURES)
    [of_samples] = score(points, ReferenceFile.open(str(tmp_path / "samples.npz")), tmp_path / "b.json")
    assert of_samples["figures"]["fid"] == pytest.approx(result["figures"]["fid"], rel=FID)
    assert len(of_samples["figures"]) == 5 and not of_samples["left_out"]


BAD_REFERENCES = {
    "nothing": ({"other": np.ones(3)}, "neither mu and sigma nor arr_0; it has other"),
    "floats": ({"arr_0": np.ones((2, 8, 8, 3))}, r"arr_0 of float64 \[2, 8, 8, 3\]; expected uint8"),
    "another network": ({"mu": np.ones(3), "sigma": np.ones((3, 3))}, r"shapes \(3,\) and \(3, 3\), not \(2048,\)"),
    "not finite": ({"mu": np.full(POOL, np.nan), "sigma": np.ones((POOL, POOL))}, "not finite"),
    "too few for balls": ({"arr_0": random_pictures(3)}, r"3 pictures \(arr_0\); precision and recall need at least 4"),
    "not symmetric": ({"mu": np.ones(POOL), "sigma": np.tri(POOL)}, "mu and sigma: the covariance is not symmetric"),
    "negative": ({"mu": np.ones(POOL), "sigma": np.diag([3.0] * (POOL - 1) + [-1])}, "not positive semi-definite"),
    "objects": ({"mu": np.array([{}]), "sigma": np.ones(3)}, "cannot be read: ValueError: Object arrays"),
}


@pytest.mark.parametrize("what", BAD_REFERENCES)
def test_a_reference_that_does_not_fit_is_refused(what, tmp_path):
    arrays, named = BAD_REFERENCES[what]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=named):
        ReferenceFile.open(str(tmp_path / "a.npz"))


def test_damaged_files_are_read_or_refused(tmp_path):
    gaussian = Gaussian(np.zeros(POOL), np.eye(POOL))
    spatial = Gaussian(np.zeros(SPATIAL), np.eye(SPATIAL))
    write_reference(resolve_path(tmp_path / "a.npz"), gaussian, spatial, (2, 8, 8, 3), [random_pictures(2)], {})
    whole, chance = (tmp_path / "a.npz").read_bytes(), random.Random(0)
    for damaged in [b"", b"PK", whole[:1000], whole[:-30]]:
        (tmp_path / "b.npz").write_bytes(damaged)
        with pytest.raises(UserError):
            ReferenceFile.open(str(tmp_path / "b.npz"))
    small = tmp_path / "small.npz"
    write_samples(resolve_path(small), (2, 8, 8, 3), [random_pictures(2)])
    data = small.read_bytes()
    assert zipfile.is_zipfile(small)
    for _ in range(100):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        small.write_bytes(flipped)
        try:
            assert sum(map(len, SampleFile.open(str(small)).blocks())) in (1, 2)
        except UserError as error:
            assert "small.npz" in str(error)


@pytest.mark.parametrize("total, pictures", [(1, 10), (3, 10), (20, 3)])
def test_a_reference_is_not_made_of_too_few_pictures(total, pictures, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=random_pictures(total))
    source, out = open_samples(str(tmp_path / "a.npz"), 10, None), resolve_path(tmp_path / "ref.npz")
    with pytest.raises(UserError, match=rf"^{min(total, pictures)} pictures are too few for a reference; at least 4"):
        make_reference(source, out, PixelFeatures(), pictures=pictures, part=10)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


# ---- Sources


def test_a_folder_is_read_in_the_order_of_its_paths_and_cropped(tmp_path):
    (tmp_path / "b").mkdir()
    sizes = {"b/1.jpg": (40, 30), "a.png": (20, 50), "c.webp": (16, 16)}
    for i, (name, size) in enumerate(sizes.items()):
        Image.fromarray(random_pictures(1, i, 64)[0]).resize(size).save(tmp_path / name)
    (tmp_path / "text.txt").write_text("not a picture")
    source = open_folder(str(tmp_path), 16)
    assert source.shape == (3, 16, 16, 3) and source.preprocessing == "ADM centre crop to 16 pixels"
    read = source.read(np.arange(3))
    for index, name in enumerate(["a.png", "b/1.jpg", "c.webp"]):
        assert np.array_equal(read[index], square(Image.open(tmp_path / name), 16))
    assert open_folder(str(tmp_path), 8).identity != source.identity
    os.utime(tmp_path / "a.png", (1, 1))
    changed = open_folder(str(tmp_path), 16)
    assert changed.version != source.version, "what was read of it before is not taken for a part of it"


def test_latents_are_decoded(earlier):
    settings = dict(workdir=None, split="test", autoencoder="pixels", size=None, part=10)
    source = open_reference_source(str(earlier / "latents"), **settings)
    kept = np.load(earlier / "records.npz")["latents"][-source.shape[0] :]
    expected = np.clip(127.5 * kept.repeat(3, axis=-1) + 128, 0, 255).astype(np.uint8)
    assert np.array_equal(source.read(np.arange(source.shape[0])), expected)
    of_run = open_reference_source("data", **settings | {"workdir": str(earlier / "run"), "autoencoder": None})
    assert of_run.shape[1:] == (8, 8, 3) and "decoded from latents of pixels" in of_run.preprocessing


def test_a_source_that_is_none_is_refused(tmp_path, earlier):
    settings = dict(part=10)
    (tmp_path / "empty").mkdir()
    for path, changes, named in (
        ("data", {}, "add its --workdir"),
        (str(tmp_path / "nothing"), {}, "is no folder of pictures, no latents and no .npz"),
        (str(tmp_path / "empty"), {}, "add --image_size"),
        (str(tmp_path / "empty"), {"size": 8}, "has no pictures"),
        (str(earlier / "latents"), {}, "add --autoencoder"),
        ("data", {"size": 8}, "--image_size has no effect on the data of a run"),
        ("data", {"workdir": str(earlier / "run"), "autoencoder": str(tmp_path)}, "autoencoder"),
        (str(tmp_path / "empty"), {"size": 8, "split": "test"}, "--split has no effect on a folder of pictures"),
        (
            str(tmp_path / "a.npz"),
            {"workdir": "a"},
            r"--workdir has no effect on an \.npz \(--make_reference=.*a\.npz\)",
        ),
        (str(earlier / "latents"), {"workdir": "a"}, "--workdir has no effect on latents"),
    ):
        with pytest.raises(UserError, match=named):
            open_reference_source(path, **settings | changes)
