"""Warnings of settings that are valid and do not fit together."""

import pytest

from lattejax.training.checks import warn_of_settings
from tests.helpers import tiny_config

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
        ({"train__ema_decay": 0.0, "train__warmup_steps": 999}, []),
        (
            {"pretrain__steps": 10, "pretrain__warmup_steps": 10, "pretrain__ema_decay": 0.5},
            [
                "in 10 steps, pretrain.warmup_steps=10 never lets the learning rate reach its value; lower "
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
        ({"train__steps": 0, "train__ema_decay": 0.9999, "train__prompt_dropout": 0.0}, []),
    ],
)
def test_settings_that_do_not_fit_together_are_a_line_of_warning(settings, expected, caplog):
    warn_of_settings(tiny_config(**QUIET | settings))
    assert caplog.messages == expected
