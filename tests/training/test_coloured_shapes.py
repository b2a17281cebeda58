"""A miniature of configs/shapes.py learns: from a package's pictures to drawings of the colours that are asked for."""

import json
import os
import runpy

import pytest

from lattejax import configuration
from lattejax.encoding.encode import encode
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The experiment's config with one layer in a group and 16 image tokens, for 900 of its pictures."""
    place = tmp_path_factory.mktemp("shapes")
    before = os.getcwd()
    os.chdir(place)
    try:
        runpy.run_path(str(ROOT / "docs" / "shapes.py"))
    finally:
        os.chdir(before)
    config = runpy.run_path(str(ROOT / "configs" / "shapes.py"))["get_config"]()
    config.images.update(name=str(place / "shapes"), train="train[300:1200]", test="train[:300]")
    config.data.latents = str(place / "latents")
    config.model.patch_size = 16
    config.model.text.update(hidden_size=64, intermediate_size=128, num_layers=4, mrope_section=(2, 3, 3))
    config.model.vision.update(depth=1, embed_dim=32, num_heads=2, hidden_size=64)
    config.pretrain.update(steps=10, batch_size=32)
    config.train.update(steps=300, batch_size=64, warmup_steps=20, ema_decay=0.98)
    config.eval.update(every=100, examples=64, sample_steps=12, images_per_prompt=1)
    for name in ("answers", "final_answers", "words", "self_consistency"):
        del config.eval.evaluators[name]
    config.eval.evaluators.final_unseen.update(images=80, prompts=20)
    config.eval.evaluators.final_words.update(images=80, prompts=80, guidance=(3.0,))
    return configuration.resolve(config)


def test_a_miniature_of_the_shapes_draws_the_colours_that_are_asked_for(config, tmp_path):
    assert encode(config, config.data.latents)
    stages.train(config, tmp_path / "run", InterruptGuard())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    figures = json.loads((tmp_path / "run" / "results.json").read_text())
    print(losses, figures)
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    assert figures["drawn_colour_guidance_3"] > 0.7  # one in eight by chance
    assert figures["unseen_drawn_colour"] > 0.5
