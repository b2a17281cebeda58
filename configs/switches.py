"""Most other options, and both of the paper's variants, on the digits; trained as in configs/ablations.py."""

from ml_collections import ConfigDict

from lattejax.experiments import ablations

SWITCHES = {
    "base": {},
    "blend": {"model.variant": "blend"},
    "residual_on_logits": {"model.residual_attention": "logits"},
    "gate_per_layer": {"model.residual_gate": "layer"},
    "random_replicas": {"model.replica_init": "random"},
    "no_latent_position": {"model.latent_position": "none"},  # only M-RoPE
    "predicting_x": {"model.prediction": "x"},  # not the velocity
    "own_ends": {"model.shared_ends": False, "train.clip_by": "group"},  # groups that share nothing
    "more_layers_late": {"model.group_sizes": (1, 1, 3, 3)},
    "short_first_interval": {"model.interval_edges": (0.0, 0.1, 0.4, 0.7, 1.0)},
    "logit_normal": {"train.density": "logit_normal"},
    "shift_to_noise": {"train.density": "shifted", "train.density_shift": 0.5, "eval.shift": 0.5},
    "not_stratified": {"train.stratified": False},
    "guidance_interval": {"eval.guidance_interval": (0.2, 0.9)},
    "heun": {"eval.solver": "heun", "eval.sample_steps": 10},  # two velocities per step
}


def get_config() -> ConfigDict:
    config = ablations.get_config()
    config.variants = tuple(SWITCHES.items())
    return config
