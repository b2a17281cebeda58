"""Ablations on the digits: variants of one base config, each a few config lines, trained from one pretrained VLM.

`configs/ablations.py` is the paper's comparison: number of groups, and residual attention on and off.
`configs/ablations.py:compute` gives the ends of that comparison each the other's training compute.
`configs/ablations.py:depth` asks of twice as many layers what the number of groups costs.
`configs/ablations.py:switches` has every other switch, and both of the paper's variants.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

PAPER = {
    "k4": {"model.num_groups": 4},
    "k4_no_residual": {"model.num_groups": 4, "model.residual_attention": "none"},
    "k2": {"model.num_groups": 2},
    "k2_no_residual": {"model.num_groups": 2, "model.residual_attention": "none"},
    "k1": {"model.num_groups": 1},  # the paper's Vanilla
    "k1_no_residual": {"model.num_groups": 1, "model.residual_attention": "none"},
}

# Why larger groups win here at equal steps: the two ends of the comparison at the other's training compute.
COMPUTE = {
    "k4_batch_x4": {"model.num_groups": 4, "train.batch_size": 480, "train.accumulation": 8},  # that of k1
    "k1_batch_quarter": {"model.num_groups": 1, "train.batch_size": 30},  # that of k4
    "k1_steps_quarter": {"model.num_groups": 1, "train.steps": 120, "train.warmup_steps": 25},  # that of k4
}

# Of 16 layers, longer, one seed; with --config.base.model.text.num_layers=8 of 8, for comparison.
DEPTH = {name: PAPER[name] for name in ("k4", "k2", "k1")}

SWITCHES = {
    "base": {},
    "blend": {"model.variant": "blend"},
    "residual_on_logits": {"model.residual_attention": "logits"},
    "gate_per_layer": {"model.residual_gate": "layer"},
    "random_replicas": {"model.replica_init": "random"},
    "no_latent_position": {"model.latent_position": "none"},  # M-RoPE alone
    "more_layers_late": {"model.group_sizes": (1, 1, 3, 3)},
    "short_first_interval": {"model.interval_edges": (0.0, 0.1, 0.4, 0.7, 1.0)},
    "logit_normal": {"train.density": "logit_normal"},
    "shift_to_noise": {"train.density": "shifted", "train.density_shift": 0.5, "eval.shift": 0.5},
    "not_stratified": {"train.stratified": False},
    "guidance_interval": {"eval.guidance_interval": (0.2, 0.9)},
    "heun": {"eval.solver": "heun", "eval.sample_steps": 10},  # two velocities a step
}


def get_config(variants: str = "paper") -> ConfigDict:
    config = ConfigDict()
    config.seeds = (0, 1, 2)
    lists = {"paper": PAPER, "compute": COMPUTE, "depth": DEPTH, "switches": SWITCHES}
    if variants not in lists:
        raise ValueError(f"configs/ablations.py:{variants} is unknown; use one of {', '.join(lists)}")
    named = lists[variants]
    config.variants = tuple(named.items())  # pairs of a name and its overrides
    config.sample_steps = (5, 10, 20, 40)  # a run of each variant is scored and timed at each

    config.base = _digits()
    config.base.train.steps = 480
    config.base.eval.every = 120
    config.base.eval.scored_images = 300
    config.base.eval.images_per_prompt = 4
    config.base.eval.sample_steps = 20
    config.base.eval.final_images = 500
    config.base.checkpoint.every = 240
    if variants == "depth":
        config.seeds = (0,)
        config.base.model.text.num_layers = 16
        config.base.train.steps = 800
        config.base.eval.every = 200
    return config


def _digits() -> ConfigDict:
    spec = importlib.util.spec_from_file_location("digits", pathlib.Path(__file__).with_name("digits.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
