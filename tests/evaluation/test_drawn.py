"""What is drawn for a score: at which guidance scales, how many images of which prompts."""

import types

import numpy as np

from lattejax.evaluation.drawn import score_drawings
from tests.helpers import tiny_config

CONFIG = tiny_config(eval__guidance=2.0, eval__sample_steps=7, seed=5)


def test_each_scale_is_drawn_and_named():
    calls = []

    def sampler(prompts, sampling, **settings):
        calls.append((prompts, sampling.num_steps, settings))
        return np.full((4, 8, 8, 3), 10 * sampling.guidance)

    subject = types.SimpleNamespace(sampler=sampler, encoder="an encoder")
    requests = types.SimpleNamespace(images=4, num_prompts=2, prompts=lambda encoder: [f"one of {encoder}", "two"])

    def score(guidance):
        return score_drawings(requests, lambda images: {"mean": images.mean()}, subject, CONFIG, guidance)

    assert score((1, 3.5)) == {"mean_guidance_1": 10, "mean_guidance_3.5": 35}
    assert score(()) == {"mean": 20}, "the config's own"
    settings = dict(images_per_prompt=2, batch_size=CONFIG.eval.batch_size, seed=5)
    assert calls == 3 * [(["one of an encoder", "two"], 7, settings)]
