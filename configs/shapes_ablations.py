"""Ablations on coloured shapes: variants of configs/shapes.py, from the VLM of its run.

python -m lattejax.sweep --config=configs/shapes_ablations.py --workdir=runs/shapes_ablations
"""

from ml_collections import ConfigDict

from lattejax.experiments import shapes

EQUAL_TIME = {"train.density": "uniform", "eval.shift": 1.0, "model.interval_edges": ()}
K2 = {"model.num_groups": 2, "model.interval_edges": (0.0, 0.25, 1.0)}
K1 = {"model.num_groups": 1, "model.interval_edges": ()}
VARIANTS = {
    "k4": {},
    "k4_no_residual": {"model.residual_attention": "none"},
    "k4_velocity": {"model.prediction": "velocity"},
    # Two ideas of DiffusionBlocks (arXiv 2506.14202): intervals that overlap, and that share the loss equally. The
    # edges are those of a run of k4, from its held-out loss over flow time. Half of it is in the last eighth: hence
    # the shift. With five or ten steps the last group still takes none.
    "k4_overlap": {"train.interval_overlap": 0.1},
    "k4_equal_time": EQUAL_TIME,
    "k4_equal_loss": EQUAL_TIME | {"model.interval_edges": (0.0, 0.32, 0.865, 0.96, 1.0), "eval.shift": 2.0},
    # The work of k4: an example runs through 3 layers in k4, 6 in k2, 12 in k1.
    "k2_work_of_k4": K2 | {"train.steps": 1000, "train.warmup_steps": 100, "train.ema_decay": 0.99},
    "k1_work_of_k4": K1 | {"train.steps": 500, "train.warmup_steps": 50, "train.ema_decay": 0.98},
    "k2": K2,
    "k1": K1,
}


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seeds = (0, 1)
    config.variants = tuple(VARIANTS.items())
    config.sample_steps = (5, 10, 20, 40)
    config.base = shapes.get_config()
    config.base.pretrain.update(init_from="runs/shapes", steps=0)
    config.base.eval.batch_size = 100
    scores = config.base.eval.evaluators
    scores.final_words.update(images=500, guidance=())
    for name in ("answers", "final_answers", "final_unseen"):
        scores[name].at = "never"
    return config
