"""Ablations on the digits: variants of one base config, each a few config lines, trained from one pretrained VLM.

`configs/ablations.py` is the paper's comparison: number of groups, with and without residual attention.
`configs/ablations.py:compute` trains each end of that comparison with the training compute of the other.
`configs/ablations.py:depth` measures the cost of the number of groups with twice as many layers.
"""

from ml_collections import ConfigDict

from lattejax.experiments import digits

PAPER = {
    "k4": {"model.num_groups": 4},
    "k4_no_residual": {"model.num_groups": 4, "model.residual_attention": "none"},
    "k2": {"model.num_groups": 2},
    "k2_no_residual": {"model.num_groups": 2, "model.residual_attention": "none"},
    "k1": {"model.num_groups": 1},  # the paper's Vanilla
    "k1_no_residual": {"model.num_groups": 1, "model.residual_attention": "none"},
}

# Why larger groups win here at equal steps: each end of the comparison with the training compute of the other.
COMPUTE = {
    "k4_batch_x4": {"model.num_groups": 4, "train.batch_size": 480, "train.accumulation": 8},  # compute of k1
    "k1_batch_quarter": {"model.num_groups": 1, "train.batch_size": 30},  # compute of k4
    "k1_steps_quarter": {  # compute of k4
        "model.num_groups": 1,
        "train.steps": 120,
        "train.warmup_steps": 25,
        "train.ema_decay": 0.96,
    },
}

# 16 layers, more steps, one seed; for comparison with 8 layers, --config.base.model.text.num_layers=8.
DEPTH = {name: PAPER[name] for name in ("k4", "k2", "k1")}

LISTS = {"paper": PAPER, "compute": COMPUTE, "depth": DEPTH}


def get_config(variants: str = "paper") -> ConfigDict:
    if variants not in LISTS:
        raise ValueError(f"configs/ablations.py:{variants} is unknown; use one of {', '.join(LISTS)}")
    config = ConfigDict()
    config.seeds = (0, 1, 2)
    config.variants = tuple(LISTS[variants].items())  # pairs of a name and its overrides
    config.sample_steps = (5, 10, 20, 40)  # a run of each variant is scored and timed with each
    config.base = digits.get_config()
    config.base.train.steps = 480
    config.base.eval.update(every=120, images_per_prompt=4, sample_steps=20)
    config.base.eval.evaluators.digits.images = 300
    config.base.eval.evaluators.final_digits.images = 500
    config.base.checkpoint.every = 240
    if variants == "depth":
        config.seeds = (0,)
        config.base.model.text.num_layers = 16
        config.base.train.steps = 800
        config.base.eval.every = 200
    return config
