"""An export is a repository of the hub: it draws what the run draws, and its card says what was measured of it."""

import dataclasses
import json
import shutil
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from lattejax.errors import UserError
from lattejax.evaluation.adm import ReferenceFile
from lattejax.files import resolve_path
from lattejax.flow.schedule import Sampling
from lattejax.runs.data import open_data
from lattejax.runs.data_facts import data_facts
from lattejax.runs.licences import IDENTIFIERS
from lattejax.runs.publishing import export
from lattejax.runs.run import Run, open_vlm
from lattejax.sampling.images import ImageSampler
from lattejax.scoring.drawn import drawn_points, read_prompts
from lattejax.scoring.points import score_points
from lattejax.scoring.reference import make_reference
from lattejax.scoring.sources import open_run_data, open_samples
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.scores import scores_on_demand, settings_on_demand
from lattejax.weights import autoencoders, hugging_face, pretrained
from tests import checkpoints
from tests.helpers import NO_SCORES, assert_same_bits, tiny_config
from tests.pixel_features import PixelFeatures, random_pictures, result

SETTINGS = dict(pretrain__steps=0, train__steps=2, train__learning_rate=0.05, eval__every=0) | NO_SCORES
FILES = {"README.md", "autoencoder.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer"}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> str:
    """A VLM in bfloat16, converted from a repository in the hub's cache."""
    directory = tmp_path_factory.mktemp("vlm")
    model = checkpoints.random_model(checkpoints.tiny_config(**checkpoints.OF_DIGITS)).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        checkpoints.save(model, in_hub_cache(patch, directory / "hub", "somebody/vlm"), {"repetition_penalty": 1.25})
        pretrained.convert("somebody/vlm", directory / "vlm")
    return str(directory / "vlm")


def trained(vlm: str, path, variant: str) -> Run:
    settings = dict(pretrain__init_from=vlm, model__text__vocab_size=checkpoints.VOCABULARY, model__variant=variant)
    stages.train(tiny_config(**SETTINGS | settings), path, InterruptGuard())
    return Run.open(path)


@pytest.fixture(scope="module")
def run(vlm, tmp_path_factory) -> Run:
    return trained(vlm, tmp_path_factory.mktemp("runs") / "run", "couple")


@pytest.fixture(scope="module")
def scores(run, tmp_path_factory):
    """A file that `evaluate` writes: two sets of 12 drawings."""
    directory = tmp_path_factory.mktemp("scores")
    np.savez(directory / "real.npz", arr_0=random_pictures(30))
    source = open_samples(str(directory / "real.npz"), 30, None)
    make_reference(source, resolve_path(directory / "ref.npz"), PixelFeatures(), pictures=20, part=30)
    asked, sizes = read_prompts(run, None), dict(num=12, seed=0, batch_size=12)
    points = drawn_points(run, asked, guidance=[1.0, 2.0], steps=[3], **sizes)
    reference, out = ReferenceFile.open(str(directory / "ref.npz")), resolve_path(directory / "scores.json")
    score_points(points, reference, PixelFeatures(), out, part=12, keep_pictures=False)
    return out


def test_scores_are_of_one_checkpoint(run, tmp_path):
    """Also while the run trains on; and if its latest is damaged, none are taken, rather than those of an earlier."""
    own = Run.open(shutil.copytree(run.workdir.path, tmp_path / "run"))
    pinned, checkpoints = own.pinned(), own.workdir.checkpoints("train")
    shutil.copytree(checkpoints / "2", checkpoints / "3")
    assert (pinned.trained_step, own.trained_step) == (2, 3)
    assert settings_on_demand(pinned, [])["trained_steps"] == 2
    [item] = [name for name in ("params", "ema") if (checkpoints / "3" / name).exists()][-1:]
    shutil.rmtree(checkpoints / "3" / item)
    with pytest.raises(UserError, match="3 is damaged"):
        drawn_points(own, read_prompts(own, None), num=12, guidance=[], steps=[], seed=0, batch_size=12)
    with pytest.raises(UserError, match="3 is damaged"):
        scores_on_demand(own, ["held_out_loss"])


def test_a_moved_autoencoder_is_found_where_the_flag_says(run, earlier, tmp_path):
    own = changed(run, tmp_path / "run", source="latents", latents=str(earlier / "latents"), autoencoder="moved")
    for open_with in (
        lambda *autoencoder: read_prompts(own, None, *autoencoder),
        lambda *autoencoder: open_run_data(own, "test", *autoencoder),
    ):
        with pytest.raises(UserError, match=r"^moved holds no converted autoencoder"):
            open_with()
        open_with("pixels")


def in_hub_cache(monkeypatch, cache, name: str):
    """Where huggingface_hub looks for a repository that it has downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    return repository / "snapshots" / "0123abc"


def changed(run: Run, path, **data: Any) -> Run:
    """A copy of a run, with other keys of config.data."""
    shutil.copytree(run.workdir.path, path)
    values = json.loads((path / "config.json").read_text())
    values["data"] |= data
    (path / "config.json").write_text(json.dumps(values))
    return Run.open(path)


def drawn(workdir) -> np.ndarray:
    sampler = ImageSampler.load(workdir)
    prompts = [sampler.encoder.drawing("a handwritten two")]
    return sampler(prompts, Sampling(3), images_per_prompt=2, batch_size=2)


def test_an_export_draws_what_the_run_draws_also_from_the_hub(run, tmp_path, monkeypatch):
    export(run, tmp_path / "mine", "apache-2.0")
    assert {file.name for file in (tmp_path / "mine").iterdir()} == FILES
    shutil.copytree(tmp_path / "mine", in_hub_cache(monkeypatch, tmp_path / "hub", "somebody/mine"))
    expected = drawn(run.workdir.path)
    for place in (tmp_path / "mine", "hf://somebody/mine", "hf://somebody/mine@main"):
        np.testing.assert_array_equal(drawn(place), expected)
    assert open_vlm("hf://somebody/mine").vlm_config == run.vlm_config
    for place, problem in {
        "hf://somebody/other": "cannot be downloaded from the hub",
        "hf://": "neither a directory nor a hub id",
        "hf://somebody/mine@old": "cannot be downloaded",
    }.items():
        with pytest.raises(UserError, match=problem):
            Run.open(place)


def test_a_card_says_what_is_known(run, tmp_path):
    export(run, tmp_path / "mine", "cc-by-4.0")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "lattejax"
    assert card.data.pipeline_tag == "any-to-any" and "text-to-image" in card.data.tags
    assert card.data.base_model == "somebody/vlm" and card.data.eval_results is None
    assert "# mine\n" in card.text and "scikit-learn's handwritten digits: 1,437 pictures to draw." in card.text
    assert "| steps of that training | 2 |" in card.text and "### Monitors" not in card.text
    assert "`cc-by-4.0`" in card.text and "python -m lattejax.sample --workdir=. " in card.text
    assert str(tmp_path) not in str(card) and str(run.workdir.path) not in str(card)

    export(Run.open(tmp_path / "mine"), tmp_path / "again")
    again = ModelCard.load(tmp_path / "again" / "README.md")
    assert again.data.base_model == "somebody/vlm" and "The weights of somebody/vlm are in this repos" in again.text
    assert again.data.license == "unknown" and "Nobody has said under which licence" in again.text
    assert "not known: an export does not record its data" in again.text
    assert "None were taken of these weights" in again.text
    assert_same_bits(Run.open(tmp_path / "again").params(), run.params())
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("mine", "again"))
    assert {name: x.dtype for name, x in first.items()} == {name: x.dtype for name, x in second.items()}
    assert len({x.dtype for x in first.values()}) == 2, "what is frozen is in the checkpoint's bfloat16"
    assert Run.open(tmp_path / "again").generation == run.generation
    assert run.generation.repetition_penalty == 1.25 and run.encoder.stop_tokens == run.generation.stop_tokens


def test_an_export_ends_answers_where_its_checkpoint_did(run, tmp_path):
    export(run, tmp_path / "mine")
    settings = tmp_path / "mine" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": 7}))
    assert Run.open(tmp_path / "mine").encoder.stop_tokens == (run.encoder.stop_tokens[0], 7)


def test_a_run_that_starts_from_an_export_decodes_as_it_does(run, tmp_path):
    export(run, tmp_path / "mine")
    settings = dict(pretrain__init_from=str(tmp_path / "mine"), model__text__vocab_size=checkpoints.VOCABULARY)
    config = tiny_config(**SETTINGS | settings | dict(train__steps=0))
    stages.train(config, tmp_path / "run", InterruptGuard())
    assert Run.open(tmp_path / "run").generation == run.generation


def test_pictures_that_are_kept_from_training_are_not_counted(run):
    data = dataclasses.replace(run.config.data, unseen="seven$")
    fewer = data_facts(dataclasses.replace(run, config=dataclasses.replace(run.config, data=data)))
    assert 0 < fewer.pictures < data_facts(run).pictures


def test_an_export_with_a_damaged_card_is_one_line(run, tmp_path):
    export(run, tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nbase_model: [\n---\n")
    with pytest.raises(UserError, match=r"the model card .*README\.md"):
        export(Run.open(tmp_path / "mine"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_model_of_the_hub_is_named_by_its_repository():
    names = [hugging_face.name_of(path) for path in ("hf://owner/name", "hf://owner/name@main", "runs/a", "..")]
    assert names == ["name", "name", "", ""]


@pytest.mark.parametrize(
    "source, said, hub_ids",
    [
        (
            "the data set somebody/pictures:small",
            "Trained on the data set somebody/pictures:small",
            ["somebody/pictures"],
        ),
        ("the data set /home/me/pictures.parquet", "Trained on the data set pictures.parquet", None),
        ("the folder pictures", "Trained on the folder pictures", None),
    ],
)
def test_a_card_names_the_data_but_not_where_it_was(source, said, hub_ids, run, earlier, tmp_path):
    latents = shutil.copytree(earlier / "latents", tmp_path / "latents")
    manifest = json.loads((latents / "manifest.json").read_text())
    manifest["encoding"]["source"] = source
    (latents / "manifest.json").write_text(json.dumps(manifest))
    own = changed(run, tmp_path / "run", source="latents", latents=str(latents))
    own.workdir.data.write_text(json.dumps({"identity": open_data(own.config).identities[0]}))
    export(own, tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert f"{said}: 12 pictures to draw." in card.text and card.data.datasets == hub_ids
    own.workdir.data.write_text('{"identity": "another"}')
    export(own, tmp_path / "other")
    assert "it has changed since the training" in (tmp_path / "other" / "README.md").read_text()


def test_a_card_has_the_command_that_converts_the_autoencoder(run, tmp_path, monkeypatch):
    model = checkpoints.random_autoencoder("sana-1.0")
    model.register_to_config(scaling_factor=0.41407)
    model.save_pretrained(in_hub_cache(monkeypatch, tmp_path / "hub", "somebody/dc-ae"))
    autoencoders.convert("somebody/dc-ae", tmp_path / "dc_ae")
    own = changed(run, tmp_path / "run", autoencoder=str(tmp_path / "dc_ae"))
    autoencoders.StoredAutoencoder.open(str(tmp_path / "dc_ae")).identity.save(own.workdir.autoencoder)
    export(own, tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "\npython -m lattejax.convert --source=somebody/dc-ae --scale=0.41407 --out=autoencoder\n" in text
    assert " --autoencoder=autoencoder " in text and "of somebody/dc-ae" in text
    (tmp_path / "dc_ae").rename(tmp_path / "moved")
    export(own, tmp_path / "without")
    text = (tmp_path / "without" / "README.md").read_text()
    assert "lattejax.convert" not in text and "Drawing needs the latents' autoencoder" in text


def test_scores_in_a_card_are_those_of_the_files(run, scores, tmp_path):
    """Monitors are in the text alone; what may be published is in the model-index too, and nothing else is."""
    monitors = json.loads(scores.read_text())["results"]
    weights = monitors[0]["settings"]["weights"]
    (tmp_path / "published.json").write_text(json.dumps({"results": [result(weights=weights)]}))
    export(run, tmp_path / "mine", scores=[str(scores), str(tmp_path / "published.json")])
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    indexed = {each.metric_type: each for each in card.data.eval_results}
    assert {name: each.metric_value for name, each in indexed.items()} == result()["figures"]
    assert indexed["fid"].dataset_name == "VIRTUAL_imagenet256_labeled.npz (abababababab)"
    assert indexed["fid"].dataset_type == "virtual_imagenet256_labeled-abababababab"
    assert indexed["fid"].metric_args["pictures"] == 50_000 and indexed["fid"].metric_args["steps"] == 40
    published, monitored = card.text.split("### Monitors")
    assert "| 50,000 | 5 | 40 | 5.8125 | 213.062 | 0.75 |" in published and "as \\| ADM &lt;has> it" in published
    assert "only a monitor" not in published and "only a monitor because: 12 pictures, not 50,000" in monitored
    for each in monitors:
        figures = " | ".join(f"{value:.6g}" for value in each["figures"].values())
        assert f"| 12 | {each['settings']['guidance']:g} | 3 | {figures} |" in monitored
    assert "2 sets of drawings were judged" in monitored and weights in monitored

    export(Run.open(tmp_path / "mine"), tmp_path / "again", scores=[str(scores)])  # the same weights
    assert ModelCard.load(tmp_path / "again" / "README.md").data.eval_results is None


def test_scores_of_the_run_are_those_of_its_last_step(run, tmp_path):
    workdir = shutil.copytree(run.workdir.path, tmp_path / "run")
    (workdir / "results.json").write_text(json.dumps({"held_out_loss": 1.25, "per_group": [1, 2], "seconds": 3.0}))
    export(Run.open(workdir), tmp_path / "last")
    text = (tmp_path / "last" / "README.md").read_text()
    assert "| held_out_loss | 1.25 |" in text and "no benchmark" in text and "| seconds" not in text
    assert "model-index" not in text
    values = json.loads((workdir / "config.json").read_text())
    values["train"]["steps"] = 3  # it was stopped before
    (workdir / "config.json").write_text(json.dumps(values))
    export(Run.open(workdir), tmp_path / "stopped")
    assert "1.25" not in (tmp_path / "stopped" / "README.md").read_text()


@pytest.mark.parametrize(
    "change, problem",
    [
        ({}, r"--scores=.*scores.json, result 1 are of other weights \(0123456789abcdef\)"),
        ({"num": "many"}, r"settings\.num is missing or wrong"),
        ({"guidance": float("nan")}, r"settings\.guidance is missing or wrong"),
        ({"npz_sha256": "00"}, "judges the pictures of an .npz"),
    ],
)
def test_scores_of_anything_else_are_refused(change, problem, run, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps({"results": [result(**change)]}))
    with pytest.raises(UserError, match=problem):
        export(run, tmp_path / "mine", scores=[str(tmp_path / "scores.json")])
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]


def test_what_is_missing_or_unknown_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "params", lambda run: pytest.fail("weights are read"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "README.md").write_text("mine")
    (tmp_path / "flat.json").write_text('{"held_out_loss": 1.0}')
    for settings, problem in (
        (dict(licence="apache"), r"--license='apache' is not one .* the nearest are apache-2\.0"),
        (dict(licence=""), "is not one of the hub's identifiers"),
        (dict(scores=[str(tmp_path / "none.json")]), "there is no .*none.json"),
        (dict(scores=[str(tmp_path / "flat.json")]), "has no results; it must be an --out of"),
        (dict(out=tmp_path / "there"), "exists already"),
    ):
        with pytest.raises(UserError, match=problem):
            export(run, **dict(out=tmp_path / "new") | settings)
    assert not (tmp_path / "new").exists() and (tmp_path / "there" / "README.md").read_text() == "mine"


def test_licences_are_the_hubs():
    assert len(IDENTIFIERS) == len(set(IDENTIFIERS)) and {"mit", "unknown", "other", "apache-2.0"} < set(IDENTIFIERS)


@pytest.mark.parametrize("variant", ["couple", pytest.param("blend", marks=pytest.mark.slow)])
def test_the_vlm_is_in_the_export_in_its_own_precision(variant, vlm, run, tmp_path):
    """What was not trained takes no more space than in the checkpoint, and is read back as the run reads it."""
    run = run if variant == "couple" else trained(vlm, tmp_path / "run", "blend")
    export(run, tmp_path / "mine", "other")
    assert_same_bits(Run.open(tmp_path / "mine").params(), run.params())
    dtypes = {name: array.dtype.name for name, array in load_file(tmp_path / "mine" / "model.safetensors").items()}
    assert dtypes["vlm.vision.merger.fc1.weight"] == "bfloat16" and dtypes["head.proj.weight"] == "float32"
    of_layers = {"couple": "bfloat16", "blend": "float32"}[variant]
    assert dtypes["vlm.text.layers.mlp.up_proj.weight"] == of_layers
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "Blend: image and text share" in text if variant == "blend" else "Couple: the VLM is frozen" in text
    assert "See the file `LICENSE`" in text and "The weights of somebody/vlm are in this repository" in text
