"""What each stage of training trains, on what, with which loss, and how it is evaluated on the way."""

from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lattejax.configuration import Config
from lattejax.data import digits
from lattejax.data.pipeline import Streams, training_batches
from lattejax.data.prompts import PromptEncoder, question_batch
from lattejax.evaluation.digits import DigitReader, answer_accuracy
from lattejax.flow.schedule import Sampling
from lattejax.models import flops, functional, latte_flow, qwen2_vl
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import Prompts
from lattejax.sampling.grid import labelled_grid
from lattejax.sampling.images import ImageSampler, read_prompts
from lattejax.training.loop import StagePlan
from lattejax.training.metrics import MetricsLog
from lattejax.training.objectives import AnswerLoss, FlowLoss, Frozen, norms_per_group
from lattejax.training.step import TrainState, make_train_step
from lattejax.weights.runs import Run, abstract_params, abstract_trained, inference_weights, open_vlm

TRAINING_PASSES = 3  # in forward passes: a backward pass costs two


# ---- The first stage: language modelling of answers


def pretrain_plan(config: Config, encoder: PromptEncoder, key: jax.Array) -> StagePlan:
    """Trains the VLM, from random weights or another run's, to answer questions about images."""
    stage, model = config.pretrain, config.model_config
    init_key, step_key = jax.random.split(key)

    def init() -> Params:
        if stage.init_from:
            return open_vlm(stage.init_from).vlm()
        return qwen2_vl.init(model.vlm, init_key)

    def evaluate(state: TrainState, log: MetricsLog) -> dict[str, Any]:
        return {"answer_accuracy": held_out_answers(config, encoder, state.ema)}

    return StagePlan(
        name="pretrain",
        settings=stage,
        abstract=abstract_params(config)["vlm"],
        init=init,
        step=make_train_step(stage, AnswerLoss(model, jnp.dtype(config.dtype), stage.remat, stage.unroll)),
        key=step_key,
        frozen=None,
        batches=Streams(questions=question_batches(config, encoder, stage.batch_size)),
        evaluate=evaluate,
        flops_per_example=TRAINING_PASSES * question_flops(config),
    )


def question_batches(config: Config, encoder: PromptEncoder, batch_size: int) -> grain.DatasetIterator:
    return training_batches(
        digits.Questions("train", encoder),
        lambda records: question_batch(encoder, records, config.data.answer_length),
        batch_size=batch_size,
        seed=config.seed,
        threads=config.data.threads,
    )


def question_flops(config: Config) -> int:
    text, vision = config.model.text, config.model.vision
    return flops.question(text, vision, config.data.answer_length, config.data.max_pixels // vision.patch_size**2)


def held_out_answers(config: Config, encoder: PromptEncoder, vlm: Params) -> float:
    weights = inference_weights(config, {"vlm": vlm})["vlm"]
    settings = config.eval
    return answer_accuracy(
        config.model_config.vlm, weights, encoder, examples=settings.examples, batch_size=settings.batch_size
    )


# ---- The second stage: flow matching


def generation_plan(run: Run, key: jax.Array) -> StagePlan:
    """Trains the generation pathway, from the run's VLM or another run's pathway; in Blend the VLM's layers too."""
    config, encoder = run.config, run.encoder
    stage, model = config.train, config.model_config
    init_key, step_key = jax.random.split(key)
    fixed = latte_flow.split_trained(model, {"vlm": run.pretrained_vlm()})[1]
    fixed = functional.cast_floats(fixed, config.dtype)
    frozen = frozen_inputs(config, encoder, fixed)
    loss = FlowLoss(
        model,
        density=stage.flow_density,
        stratified=stage.stratified,
        prompt_dropout=stage.prompt_dropout,
        answer_weight=stage.answer_weight,
        dtype=jnp.dtype(config.dtype),
        remat=stage.remat,
        unroll=stage.unroll,
    )
    held_out_loss = jax.jit(loss.held_out)
    held_out = drawings(config, encoder, "test")
    few = range(len(held_out))[: config.eval.examples or None]
    reader = DigitReader() if config.eval.scored_images else None

    def init() -> Params:
        if stage.init_from:
            return Run.open(stage.init_from).trained(config)
        return latte_flow.split_trained(model, latte_flow.init(model, run.pretrained_vlm(), init_key))[0]

    def evaluate(state: TrainState, log: MetricsLog) -> dict[str, Any]:
        losses = held_out_loss(state.ema, frozen, image_batch(config, encoder, [held_out[i] for i in few]))
        lengths = np.asarray(model.generation.intervals.lengths)
        metrics = {"held_out_loss": np.sum(losses * lengths), "held_out_loss_per_group": losses}
        params = functional.merge(fixed, state.ema)
        if config.trains_answers:
            metrics["answer_accuracy"] = held_out_answers(config, encoder, params["vlm"])
        weights = inference_weights(config, params)
        log.image(int(state.step), "samples", sample_grid(config, encoder, weights))
        if reader is not None:
            images = draw_digits(config, encoder, weights, config.eval.scored_images, config.eval.sampling)
            metrics |= reader.score(images)
        return metrics

    batches = {
        "images": training_batches(
            drawings(config, encoder, "train"),
            lambda records: image_batch(config, encoder, records),
            batch_size=stage.batch_size,
            seed=config.seed,
            threads=config.data.threads,
        )
    }
    if config.trains_answers:
        batches["questions"] = question_batches(config, encoder, stage.answer_batch_size)
    return StagePlan(
        name="train",
        settings=stage,
        abstract=abstract_trained(config),
        init=init,
        step=make_train_step(
            stage,
            loss,
            blocks={"images": config.model.num_groups if stage.stratified else 1},
            gradient_metrics=lambda gradients: {"grad_norm_per_group": norms_per_group(model, gradients)},
        ),
        key=step_key,
        frozen=frozen,
        batches=Streams(**batches),
        evaluate=evaluate,
        flops_per_example=generation_flops(config),
        profile=config.profile,
    )


def frozen_inputs(config: Config, encoder: PromptEncoder, fixed: Params) -> Frozen:
    """What the loss reads besides what it trains. Prompts that repeat are read once: in Couple here and now."""
    model, captions = config.model_config, caption_prompts(config, encoder)
    if not config.train.share_contexts:
        return Frozen(fixed, unconditional=jax.tree.map(lambda x: x[-1:], captions))
    if config.trains_answers:
        return Frozen(fixed, captions=captions)
    return Frozen({}, contexts=read_prompts(model, fixed["vlm"], captions))


def drawings(config: Config, encoder: PromptEncoder, split: str) -> digits.Drawings:
    return digits.Drawings(split, config.autoencoder, encoder, config.data.prompts)


def caption_prompts(config: Config, encoder: PromptEncoder) -> Prompts:
    """The prompts of all captions, and last the empty one."""
    prompts = [encoder.drawing(caption) for caption in digits.CAPTIONS]
    return encoder.batch([*prompts, encoder.unconditional()], config.data.prompt_length)


def image_batch(config: Config, encoder: PromptEncoder, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Latents, with the numbers of their captions where those are read once, and otherwise with their prompts."""
    batch = {"latents": np.stack([record["latents"] for record in records])}
    if config.train.share_contexts:
        return batch | {"caption": np.stack([record["caption"] for record in records])}
    return batch | {"prompts": encoder.batch([record["prompt"] for record in records], config.data.prompt_length)}


def generation_flops(config: Config) -> float:
    """Of one image's share of a training step."""
    model, stage, tokens = config.model_config, config.train, config.data.prompt_length
    reading = flops.reading(model.vlm.text, tokens)
    passes = TRAINING_PASSES * flops.velocity(model.generation, tokens)
    reading *= TRAINING_PASSES if config.trains_answers else 1
    if not stage.share_contexts:
        passes += reading
    elif config.trains_answers:
        passes += reading * (len(digits.CAPTIONS) + 1) * stage.accumulation / stage.batch_size
    if config.trains_answers:
        passes += TRAINING_PASSES * question_flops(config) * stage.answer_batch_size / stage.batch_size
    return passes


# ---- Samples


def sample_grid(config: Config, encoder: PromptEncoder, weights: Params) -> Image.Image:
    """Draws the config's prompts, or where prompts are pictures one of each digit."""
    settings = config.eval
    if config.data.prompts == "captions":
        labels, prompts = settings.prompts, [encoder.drawing(prompt) for prompt in settings.prompts]
    else:
        labels = [f"{digits.REQUEST} {word}" for word in digits.WORDS]
        prompts = drawings(config, encoder, "test").one_of_each()
    sampler = ImageSampler(config.model_config, config.autoencoder, encoder, weights)
    images = sampler(
        prompts,
        settings.sampling,
        images_per_prompt=settings.images_per_prompt,
        batch_size=settings.batch_size,
        seed=config.seed,
    )
    return labelled_grid(images, labels)


def draw_digits(config: Config, encoder: PromptEncoder, weights: Params, count: int, sampling: Sampling) -> np.ndarray:
    """Draws `count` images, zeros first, as many of each digit, from the prompts of held-out records."""
    sampler = ImageSampler(config.model_config, config.autoencoder, encoder, weights)
    return sampler(
        drawings(config, encoder, "test").one_of_each(),
        sampling,
        images_per_prompt=count // len(digits.WORDS),
        batch_size=config.eval.batch_size,
        seed=config.seed,
    )
