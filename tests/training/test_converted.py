"""Training from converted weights, and exporting what was trained."""

import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lattejax.errors import UserError
from lattejax.runs.publishing import export
from lattejax.runs.run import Run
from lattejax.sweeps.sweep import has_same_vlm
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.weights import shards, trees
from lattejax.weights.pretrained import Pretrained
from tests import checkpoints
from tests.helpers import NO_DIGITS, assert_same_bits, randomize, tiny_config


def config(converted, **overrides):
    settings = dict(model__text__vocab_size=checkpoints.VOCABULARY, pretrain__init_from=str(converted))
    settings |= dict(pretrain__steps=0, train__steps=2, train__ema_decay=0.0, train__learning_rate=0.05)
    settings |= dict(eval__every=0) | NO_DIGITS  # no score is used
    return tiny_config(**settings | overrides)


@pytest.fixture(scope="module")
def converted():
    return checkpoints.convert(checkpoints.random_model(checkpoints.tiny_config(**checkpoints.OF_DIGITS)))


@pytest.fixture(scope="module")
def run(converted, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    stages.train(config(converted), path, InterruptGuard())
    return Run.open(path)


def test_a_run_starts_from_converted_weights_and_their_tokenizer(run, converted):
    source = Pretrained.open(converted)
    assert_same_bits(run.pretrained_vlm(), source.params("float32"))
    question = "Which digit is this?"
    ours, theirs = (each.encoder.question(question).input_ids for each in (run, source))
    np.testing.assert_array_equal(ours, theirs)


def test_a_run_of_blend_has_its_vlm_whether_it_refers_to_it_or_has_a_copy(converted, tmp_path):
    """As the runs of a sweep do, which start from the sweep's VLM: those of earlier versions have a copy."""
    runs = []
    for name, source in (("vlm", converted), ("run", tmp_path / "vlm")):
        stages.pretrain(config(source, model__variant="blend"), tmp_path / name, InterruptGuard())
        runs.append(Run.open(tmp_path / name))
        assert runs[-1].converted_vlm() is not None and not runs[-1].workdir.vlm.exists()
    assert has_same_vlm(*runs)
    weights = runs[1].pretrained_vlm()
    runs[1].workdir.vlm_reference.unlink()
    trees.save_weights(runs[1].workdir.vlm, weights)
    assert has_same_vlm(*runs)
    runs[1].workdir.vlm.rmtree()
    trees.save_weights(runs[1].workdir.vlm, randomize(weights))
    assert not has_same_vlm(*runs)


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(model__text__rope_theta=3.0), r"config\.model\.text\.rope_theta is 3\.0, theirs 10000\.0"),
        (dict(model__vision__mlp_ratio=3), r"config\.model\.vision\.mlp_ratio is 3, theirs 4"),
    ],
)
def test_weights_of_another_vlm_are_refused_before_anything_is_written(change, named, converted, tmp_path):
    with pytest.raises(UserError, match=named):
        stages.train(config(converted, **change), tmp_path / "run", InterruptGuard())
    assert not (tmp_path / "run").exists()


def test_an_export_holds_the_average_and_opens_like_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    export(run, tmp_path / "export")
    files = sorted((tmp_path / "export").glob("*.safetensors"))
    assert len(files) > 2
    stored = {name: array for file in files for name, array in load_file(file).items()}
    np.testing.assert_array_equal(stored["head.proj.weight"], run.trained()["head"]["proj"]["weight"])

    opened = Run.open(tmp_path / "export")
    assert_same_bits(opened.params(), run.params())
    assert_same_bits(opened.trained(), run.trained())
    assert_same_bits(opened.vlm(), run.vlm())
    assert opened.config == run.config
    np.testing.assert_array_equal(opened.encoder.drawing("a nine").input_ids, run.encoder.drawing("a nine").input_ids)

    with pytest.raises(UserError, match="holds exported weights"):
        stages.train(run.config, tmp_path / "export", InterruptGuard())
    os.truncate(files[1], 500)
    with pytest.raises(UserError, match=f"{files[1].name} cannot be read"):
        opened.params()


def test_a_run_starts_from_an_export(run, tmp_path):
    export(run, tmp_path / "export")
    again = config(tmp_path / "export", train__init_from=str(tmp_path / "export"), train__steps=0)
    stages.train(again, tmp_path / "run", InterruptGuard())
    assert_same_bits(Run.open(tmp_path / "run").params(), run.params())


def test_an_export_that_lacks_a_tensor_is_refused(run, tmp_path):
    export(run, tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    stored = load_file(file)
    del stored["head.proj.weight"]
    save_file(stored, file)
    with pytest.raises(UserError, match=r"head/proj/weight: None, not \(4, 32\)"):
        Run.open(tmp_path / "export").params()


def test_an_untrained_run_is_not_exported(run, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        untrained = tmp_path / "untrained"
        untrained.mkdir()
        for part in ("config.json", "tokenizer", "vlm"):
            os.symlink(run.workdir.path / part, untrained / part)
        export(Run.open(untrained), tmp_path / "export")
    assert not (tmp_path / "export").exists()
