"""A miniature of configs/shapes.py learns: from pictures of a package to drawings in the colours that are asked for."""

import json
import runpy

from tests.helpers import ROOT

COMPUTE_MUCH = {"XLA_FLAGS": ""}  # compiled with all optimizations, unlike other tests


def test_a_miniature_of_the_shapes_draws_the_colours_that_are_asked_for(tmp_path, monkeypatch, forked_command):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "docs" / "shapes.py"))
    latents, workdir = tmp_path / "latents", tmp_path / "run"
    config = [f"--config={ROOT / 'tests' / 'training' / 'miniature.py'}", f"--config.images.name={tmp_path / 'shapes'}"]
    for command in (["encode", f"--out={latents}"], ["train", f"--workdir={workdir}"]):
        done = forked_command(*command, *config, f"--config.data.latents={latents}", env=COMPUTE_MUCH)
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert len(losses) == 2 and losses[0] > losses[1]
    figures = json.loads((workdir / "results.json").read_text())
    assert figures["reader_colour"] > 0.95
    assert figures["drawn_colour"] > 0.4, "by chance: one in eight"
