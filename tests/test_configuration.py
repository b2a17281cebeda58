"""Config keys are checked for name, type and value before any work starts."""

import dataclasses
import json

import pytest
from etils import epath

import lattejax
from lattejax import configuration
from lattejax.errors import UserError
from tests.helpers import ROOT, config_file, tiny_config


def test_the_digits_config_is_complete_and_survives_json(tmp_path):
    config = configuration.resolve(config_file("digits"))
    path = epath.Path(tmp_path) / "config.json"
    configuration.save(config, path)
    assert configuration.load(path) == config
    values = json.loads(path.read_text())
    assert values.pop("lattejax_version") == lattejax.__version__
    assert set(values) == {field.name for field in dataclasses.fields(config)}


def test_every_key_has_a_default_and_an_experiment_only_overrides():
    usual = configuration.resolve(configuration.defaults())
    assert usual == configuration.Config()
    assert (usual.model.text.num_layers, usual.model.num_groups, usual.train.batch_size) == (28, 4, 2048)
    stated = configuration.differences(configuration.resolve(config_file("imagenet256")), usual)
    assert "mesh.expert: 1 -> 4" in stated and len(stated) == 13
    for experiment in (ROOT / "configs").glob("*.py"):
        assert len(experiment.read_text().splitlines()) <= 60


def test_a_described_config_marks_what_differs():
    lines = configuration.describe(configuration.resolve(config_file("digits"))).splitlines()
    assert lines[0] == "seed = 0" and "model.patch_size = 2  # not 1" in lines
    assert [line.partition(" ")[0] for line in lines if ".evaluators." not in line] == [
        key for key in configuration.known_keys() if key != "eval.evaluators"
    ]


def test_retired_keys_keep_their_meaning():
    """An earlier config of the digits resolves to the current experiment."""
    values = config_file("digits").to_dict()
    values["eval"] |= {"evaluators": {}, "scored_images": 100, "final_images": 1000}
    assert configuration.resolve(values) == configuration.resolve(config_file("digits"))


def test_unknown_keys_in_a_config_of_a_later_version_are_named(tmp_path):
    path = epath.Path(tmp_path) / "config.json"
    configuration.save(tiny_config(), path)
    values = json.loads(path.read_text())
    values["train"]["muon"] = True
    path.write_text(json.dumps(values | {"lattejax_version": "9.0.0"}))
    with pytest.raises(UserError, match=r"has train\.muon, unknown to lattejax \d.*; it was written by 9\.0\.0"):
        configuration.load(path)


def changed(section: str, name: str, value: object):
    config = config_file("digits").to_dict()
    (config[section] if section else config)[name] = value
    return config


@pytest.mark.parametrize(
    "config, message",
    [
        (changed("train", "learnig_rate", 1.0), r"unknown config key train\.learnig_rate; .*train\.learning_rate"),
        (changed("train", "steps", 1.5), r"config\.train\.steps=1\.5 is of type float; expected int"),
        (changed("train", "share_contexts", 1), r"config\.train\.share_contexts=1 is of type int; expected bool"),
        (changed("eval", "prompts", "a"), r"config\.eval\.prompts='a' must be a tuple"),
        (changed("", "train", 3), r"config\.train=3 must be a section"),
        (changed("", "dtype", "float16"), r"dtype='float16' must be one of \['float32', 'bfloat16'\]"),
        (changed("model", "variant", "blended"), r"variant='blended' is unknown; use one of \['couple', 'blend'\]"),
        (changed("model", "group_sizes", (2, 2, 2, 1)), r"group_sizes=\(2, 2, 2, 1\) sum to 7, not to the 8 layers"),
        (
            changed("model", "group_sizes", (2.0, 2, 2, 2)),
            r"config\.model\.group_sizes=2\.0 is of type float; expected int",
        ),
        (changed("model", "interval_edges", (0.0, 0.2, 0.4, 0.6, 0.9)), "must increase from 0 to 1"),
        (changed("train", "density", "beta"), r"config\.train\.density='beta' must be one of"),
        (changed("train", "density_shift", 0.0), r"config\.train\.density_shift=0\.0 must be above 0"),
        (changed("train", "answer_batch_size", 0), r"config\.train\.answer_batch_size=0 must be from 1"),
        (changed("eval", "sample_steps", 0), r"config\.eval\.sample_steps=0 must be from 1"),
        (changed("eval", "solver", "rk4"), r"config\.eval\.solver='rk4' must be one of"),
        (changed("eval", "guidance_interval", (0.9, 0.1)), r"config\.eval\.guidance_interval"),
        (
            changed("eval", "evaluators", {"digits": 3}),
            r"config\.eval\.evaluators={.*} must have a section of settings",
        ),
        (
            changed("eval", "final_images", 20),
            r"final_images has been removed: use config\.eval\.evaluators\.final_digits\.images",
        ),
        (changed("train", "clip_by", "layer"), r"config\.train\.clip_by='layer' must be one of \['model', 'group'\]"),
        (changed("train", "clip_by", "group"), r"train\.clip_by='group' needs groups that share no weights"),
        (changed("data", "prompts", "pictures"), r"set train\.share_contexts=False"),
        (changed("model", "num_groups", 3), r"config\.model\.num_groups=3 does not divide the 8 layers .* use one of"),
        (changed("mesh", "expert", -1), r"config\.mesh\.expert=-1, but data too; only one axis may be -1"),
        (changed("train", 1, 2), r"unknown config key train\.1"),
        (changed("", 1, 2), "unknown config key 1"),
        (changed("model", "residual_attention", "yes"), "residual_attention='yes' is unknown; use one of"),
        (changed("model", "patch_size", 3), r"patch_size=3 does not divide latents of shape \(8, 8, 1\)"),
        (changed("train", "batch_size", 122), "must be a multiple of .* equal share"),
        (
            changed("pretrain", "accumulation", 5),
            r"config\.pretrain\.batch_size=48 must be a multiple of accumulation=5",
        ),
        (changed("train", "remat", "some"), r"config\.train\.remat='some' must be one of"),
        (changed("train", "ema_decay", 1.0), r"config\.train\.ema_decay=1\.0 must be at least 0 and below 1"),
        (changed("train", "init_from", "runs/a"), r"set pretrain\.init_from to the same run"),
    ],
)
def test_bad_values_are_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        configuration.resolve(config)


def test_blends_questions_must_split_into_micro_batches():
    config = changed("model", "variant", "blend")
    config["train"]["answer_batch_size"] = 25
    with pytest.raises(UserError, match=r"train\.answer_batch_size=25 must be a multiple of train\.accumulation \(2\)"):
        configuration.resolve(config)


def test_intervals_overlap_only_if_groups_have_their_own_rows():
    config = changed("train", "stratified", False)
    config["train"]["interval_overlap"] = 0.1
    with pytest.raises(UserError, match="interval_overlap needs stratified=True"):
        configuration.resolve(config)
    config = changed("model", "num_groups", 1)
    config["train"]["interval_overlap"] = 0.1
    with pytest.raises(UserError, match=r"config\.train\.interval_overlap=0\.1 has no effect with model\.num_groups=1"):
        configuration.resolve(config)


def test_an_unstratified_batch_need_not_be_a_multiple_of_the_groups():
    config = changed("train", "batch_size", 122)
    config["train"]["stratified"] = False
    configuration.resolve(config)


def test_a_density_that_starves_a_group_is_refused():
    config = changed("train", "density", "logit_normal")
    config["train"] |= {"density_mean": -10.0, "density_std": 0.5}
    with pytest.raises(UserError, match=r"leaves a group almost no flow times .*\[1\.0, 0\.0, 0\.0, 0\.0\]"):
        configuration.resolve(config)


def test_a_pathway_starts_only_with_its_own_vlm():
    config = changed("train", "init_from", "runs/a")
    config["pretrain"] |= {"init_from": "runs/b", "steps": 0}
    with pytest.raises(UserError, match=r"set pretrain\.init_from to the same run"):
        configuration.resolve(config)


def test_a_missing_key_is_named():
    config = config_file("digits").to_dict()
    del config["train"]["ema_decay"]
    with pytest.raises(UserError, match=r"the config lacks train\.ema_decay"):
        configuration.resolve(config)


def test_differences_name_the_key_and_both_values():
    old, new = tiny_config(), tiny_config(train__steps=13, model__text__rope_theta=9.0)
    assert configuration.differences(new, old) == ["model.text.rope_theta: 10000.0 -> 9.0", "train.steps: 12 -> 13"]


def test_autoencoder_latents_fix_the_pathways_geometry():
    generation = tiny_config(model__patch_size=4).model_config.generation
    assert generation.latent_shape == (8, 8, 1) and generation.grid == (2, 2) and generation.token_dim == 16
