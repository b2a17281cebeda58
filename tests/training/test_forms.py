"""Training on what was encoded, from every form: Couple after the VLM's own stage, and Blend; resumed exactly."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from lattejax.data.examples import choose_prompt, image_batcher
from lattejax.data.pipeline import Batches
from lattejax.data.prompts import question_batch
from lattejax.encoding.encode import encode
from lattejax.errors import UserError
from lattejax.interrupts import Interrupted
from lattejax.runs.data import open_data
from lattejax.runs.run import Run
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.scores import scores_on_demand
from tests import forms, pictures
from tests.helpers import NO_DIGITS, assert_same_bits, encoder_for, run_interrupted, tiny_config


def config_of(path, images, **overrides):
    """A small model on pixels in colour; answers are scored at the end."""
    settings = pictures.settings(path, "pixels", **NO_DIGITS) | {
        "data__latents": str(path / "latents"),
        "data__latent_shape": (16, 16, 3),
        "data__max_pixels": 1024,
        "data__prompt_length": 96,
        "data__answer_length": 160,
        "model__patch_size": 4,
        "pretrain__steps": 2,
        "train__steps": 3,
        "train__share_contexts": False,
        "eval__every": 0,
        "eval__evaluators__answers__at": "never",
        "eval__evaluators__final_answers__at": "end",
        "eval__examples": 4,
    }
    images = {f"images__{key}": value for key, value in (forms.SPLITS | images).items()}
    return tiny_config(**settings | images | overrides)


@functools.cache
def encoded(form, make_path):
    path = make_path(form)
    config = config_of(path, forms.FORMS[form](path / "data"))
    assert encode(config, config.data.latents)
    return config


@pytest.fixture
def config_for(tmp_path_factory):
    return lambda form: encoded(form, tmp_path_factory.mktemp)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["couple", "blend"])
@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_can_be_trained_on(form, variant, config_for, tmp_path):
    """Couple and Blend, each after a stage on the form's own questions; captions vary, and so do image sizes."""
    config = config_for(form)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, variant=variant))
    results = stages.train(config, tmp_path, InterruptGuard())
    check(results, tmp_path, variant)


def check(results, workdir, variant):
    assert {"held_out_loss", "answer_accuracy"} <= results.keys()
    assert all(np.isfinite(value) for value in results.values())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert any("answer_loss" in line for line in lines if line["stage"] == "train") == (variant == "blend")


@pytest.mark.slow
def test_a_stopped_blend_resumes_its_two_streams_exactly(config_for, tmp_path):
    config = config_for("folder")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, variant="blend"))
    check(stages.train(config, tmp_path / "complete", InterruptGuard()), tmp_path / "complete", "blend")
    with pytest.MonkeyPatch.context() as patch, InterruptGuard() as guard:
        patch.setattr(stages, "run_stage", functools.partial(run_interrupted, before_step=2))
        with pytest.raises(Interrupted):
            stages.train(config, tmp_path / "stopped", guard)
    stages.train(config, tmp_path / "stopped", InterruptGuard())
    stopped, complete = (Run.open(tmp_path / name).trained() for name in ("stopped", "complete"))
    assert_same_bits(stopped, complete)


def test_each_epoch_draws_one_of_a_pictures_captions_by_seed(config_for):
    config = config_for("folder")
    drawing = open_data(config).drawings("train", encoder_for(config)).__getitems__([0])[0]
    assert len(drawing.prompts) == 2
    taken = [[choose_prompt(drawing, seed, position).caption for position in range(200)] for seed in (0, 0, 1)]
    assert taken[0] == taken[1] != taken[2]
    counts = [taken[0].count(prompt.caption) for prompt in drawing.prompts]
    assert min(counts) > 70 and sum(counts) == 200


def test_batches_of_any_questions_have_one_shape(config_for):
    """That of the largest images and the most images of all."""
    config = config_for("llava")
    encoder, source = encoder_for(config), open_data(config)
    questions = source.questions("train", encoder)
    grids = {prompt.images[0].grid for prompt in questions.__getitems__(range(len(questions)))}
    assert len(grids) > 2 and max(np.prod(grid) for grid in grids) <= questions.bounds.patches
    shapes = {
        str(jax.tree.map(np.shape, question_batch(encoder, questions.__getitems__([i]), 160, questions.bounds)))
        for i in range(len(questions))
    }
    assert len(shapes) == 1
    complete, *halves = (
        next(
            Batches(
                questions,
                lambda records, _: question_batch(encoder, records, 160, questions.bounds),
                batch_size=4,
                seed=0,
                threads=1,
                rows=rows,
            )
        )
        for rows in (None, [0, 2], [1, 3])
    )
    for rows, half in zip(([0, 2], [1, 3]), halves, strict=True):  # as two processes read them
        assert_same_bits(half, jax.tree.map(lambda x, rows=rows: x[rows], complete))
    lengths = [len(prompt.input_ids) for prompt in questions.without_pixels()]
    assert lengths == [len(prompt.input_ids) for prompt in questions.__getitems__(range(len(questions)))]
    held_out = source.questions("test", encoder)
    assert held_out.text(0)[0] == "How wide?", "the last of a conversation"
    first, answer = held_out.text(0, turn=0)
    assert first != "How wide?"
    asked, complete = held_out.unanswered(0, turn=0).input_ids, held_out.unanswered(0).input_ids
    assert_same_bits(asked, complete[: len(asked)])
    assert encoder.tokenizer.decode(complete[len(asked) :]).startswith(answer)


def test_prompts_with_images_are_trained_on(tmp_path):
    """A text and an image in, an image out; their contexts cannot be shared."""
    made = forms.folder(tmp_path / "data")
    lines = []
    for i, record in enumerate(forms.records()):
        other = forms.records()[i - 1]["name"]
        lines.append(json.dumps({"file_name": record["name"], "text": "the next", "prompt_images": [other]}) + "\n")
    (tmp_path / "data" / "files" / "metadata.jsonl").write_text("".join(lines))
    config = config_of(tmp_path, made, pretrain__steps=0, eval__evaluators__final_answers__at="never")
    assert encode(config, config.data.latents)
    source, encoder = open_data(config), encoder_for(config)
    drawings = source.drawings("train", encoder)
    records = drawings.__getitems__(range(len(drawings)))
    assert all(len(drawing.prompts[0].images) == 1 for drawing in records) and source.captions == ()
    batch = image_batcher(config, encoder, (), drawings.bounds)(records)
    assert batch["prompts"].images.patches.shape[:3] == (len(records), 1, drawings.bounds.patches)
    shared = dataclasses.replace(config, train=dataclasses.replace(config.train, share_contexts=True))
    with pytest.raises(UserError, match="prompts with images: contexts cannot be shared"):
        stages.train(shared, tmp_path / "run", InterruptGuard())
    assert np.isfinite(stages.train(config, tmp_path / "run", InterruptGuard())["held_out_loss"])


def test_questions_alone_train_the_vlm(tmp_path):
    """What most of LLaVA's data sets are. There is nothing to draw, which only a pathway's training needs."""
    made = forms.folder(tmp_path / "data")
    file = tmp_path / "data" / "files" / "metadata.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [{key: record[key] for key in ("file_name", "questions")} for record in records if record.get("questions")]
    file.write_text("".join(json.dumps(record) + "\n" for record in kept))
    listed = {"held_out_loss": {}, "samples": {}, "final_answers": {"type": "answers", "at": "end"}}
    config = config_of(tmp_path, made, eval__evaluators=listed)
    assert encode(config, config.data.latents)
    assert not open_data(config).has_drawings
    with pytest.raises(UserError, match=r"train.steps=3 would train on drawings, and .* has none; set train.steps=0"):
        stages.train(config, tmp_path / "run", InterruptGuard())
    alone = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=0))
    assert list(stages.train(alone, tmp_path / "run", InterruptGuard())) == ["answer_accuracy", "seconds"]
    with pytest.raises(UserError, match="no held-out drawings"):
        scores_on_demand(Run.open(tmp_path / "run"), ["held_out_loss"])


def test_questions_longer_than_the_config_allows_are_found_before_training(config_for, tmp_path):
    config = config_for("folder")
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, answer_length=60))
    with pytest.raises(UserError, match="more than the config's limit of 60"):
        stages.train(short, tmp_path / "run", InterruptGuard())
    larger = dataclasses.replace(config, data=dataclasses.replace(config.data, max_pixels=4096))
    with pytest.raises(UserError, match=r"max_pixels=4096, but the images in .* at most 1024; lower it"):
        stages.train(larger, tmp_path / "run", InterruptGuard())
    assert not (tmp_path / "run").exists()
