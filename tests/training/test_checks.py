"""Checks before any work starts."""

import dataclasses

import pytest

from lattejax import configuration
from lattejax.data import tokenizer as tokenizers
from lattejax.errors import UserError
from lattejax.runs.data import open_data
from lattejax.runs.workdir import Workdir
from lattejax.training import stages
from lattejax.training.checks import changes, find_tokenizer, refuse_another_config, warn_of_settings
from lattejax.training.interrupt import InterruptGuard
from tests.helpers import encoder_for, tiny_config

QUIET = dict(pretrain__steps=0, train__steps=1000, train__warmup_steps=10, train__ema_decay=0.99)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, []),
        (
            {"train__ema_decay": 0.9999, "train__warmup_steps": 5000},
            [
                "in 1,000 steps, train.ema_decay=0.9999 leaves 90% of the initial weights in the average, which is "
                "what is scored and sampled; train.warmup_steps=5000 never lets the learning rate reach its value; "
                "lower train.ema_decay and train.warmup_steps"
            ],
        ),
        ({"train__ema_decay": 0.9999, "train__steps": 20_000}, []),
        ({"train__ema_decay": 0.0, "train__warmup_steps": 1000}, []),
        (
            {"pretrain__steps": 10, "pretrain__warmup_steps": 11, "pretrain__ema_decay": 0.5},
            [
                "in 10 steps, pretrain.warmup_steps=11 never lets the learning rate reach its value; lower "
                "pretrain.ema_decay and pretrain.warmup_steps"
            ],
        ),
        (
            {"train__prompt_dropout": 0.0, "eval__guidance": 2.0},
            [
                "train.prompt_dropout=0 never trains the empty prompt, which eval.guidance=2 guides away from; set "
                "eval.guidance=1, or a train.prompt_dropout such as 0.1"
            ],
        ),
        ({"train__prompt_dropout": 0.0, "eval__guidance": 1.0}, []),
        ({"train__density": "shifted", "train__density_shift": 0.5}, []),
        (
            {"train__density_shift": 0.5},
            ["train.density_shift=0.5 has no effect with train.density='uniform'; it needs 'shifted'"],
        ),
        (
            {"model__residual_gate": "layer", "model__residual_attention": "none"},
            [
                "model.residual_gate='layer' has no effect with model.residual_attention='none'; it needs "
                "'probabilities' or 'logits'"
            ],
        ),
        ({"train__steps": 0, "train__ema_decay": 0.9999, "train__prompt_dropout": 0.0}, []),
    ],
)
def test_settings_that_do_not_fit_together_are_a_line_of_warning(settings, expected, caplog):
    warn_of_settings(tiny_config(**QUIET | settings))
    assert caplog.messages == expected


def test_a_mesh_that_would_not_fit_the_other_config_is_no_reason_to_fail():
    ours, theirs = tiny_config(model__num_groups=1), tiny_config(mesh__expert=2)
    assert changes(ours, theirs) == ["model.num_groups: 2 -> 1"]
    free = {"mesh": theirs.mesh, "images": dataclasses.replace(theirs.images, threads=3), "most_skipped_steps": 7}
    assert changes(dataclasses.replace(tiny_config(), **free), tiny_config()) == []


def test_what_a_killed_start_left_is_not_taken(tmp_path):
    """It wrote a tokenizer, but no config.json, which is written last."""
    config, workdir = tiny_config(), Workdir.at(tmp_path)
    tokenizers.save(tokenizers.train(["something else"], 270), workdir.tokenizer)
    found = find_tokenizer(config, workdir, open_data(config))
    assert found.get_vocab() == encoder_for(config).tokenizer.get_vocab()
    configuration.save(config, workdir.config)
    assert find_tokenizer(config, workdir, open_data(config)).get_vocab() != found.get_vocab()


def test_weights_of_an_unknown_config_are_not_taken(tmp_path):
    workdir = Workdir.at(tmp_path)
    workdir.vlm.mkdir()
    with pytest.raises(UserError, match=r"has no config\.json, but vlm; use another --workdir"):
        refuse_another_config(tiny_config(), workdir)


def test_a_run_without_weights_to_start_from_is_named_before_a_workdir_is_made(tmp_path):
    source, new = Workdir.at(tmp_path / "source"), tmp_path / "new"
    config = tiny_config(pretrain__steps=0, pretrain__init_from=str(source.path))
    tokenizers.save(encoder_for(config).tokenizer, source.tokenizer)
    configuration.save(tiny_config(), source.config)
    with pytest.raises(UserError, match="source has no finished VLM yet"):
        stages.train(config, new, InterruptGuard())
    assert not (new / "config.json").exists()
