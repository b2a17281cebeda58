"""What each stage of training trains, on what, with which loss, and how it is evaluated on the way."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from lattejax.configuration import Config
from lattejax.data import digits
from lattejax.data.examples import image_batcher, open_source
from lattejax.data.pipeline import Batches, Streams
from lattejax.data.prompts import PromptEncoder, question_batch
from lattejax.errors import UserError
from lattejax.evaluation.digits import DigitReader, answer_accuracy
from lattejax.flow.schedule import Sampling
from lattejax.models import flops, functional, latte_flow, qwen2_vl
from lattejax.models.functional import Params
from lattejax.models.generation import Context
from lattejax.models.qwen2_vl import Prompts
from lattejax.parallel import hosts, rules
from lattejax.parallel.rows import Rows
from lattejax.sampling.grid import labelled_grid
from lattejax.sampling.images import ImageSampler, read_prompts
from lattejax.training.held_out import HeldOutLoss
from lattejax.training.loop import StagePlan
from lattejax.training.metrics import MetricsLog
from lattejax.training.objectives import AnswerLoss, FlowLoss, Frozen, norms_per_group, weigh_answers
from lattejax.training.step import TrainState, make_train_step
from lattejax.weights.runs import Run, abstract_params, abstract_trained, inference_weights, open_vlm

TRAINING_PASSES = 3  # in forward passes: a backward pass costs two
PROMPTS_AT_A_TIME = 128  # when contexts are made ahead


def stage_rows(config: Config) -> dict[str, dict[str, Rows]]:
    """How the rows of each stage's streams of batches are arranged."""
    pretrain, train = config.pretrain, config.train
    groups = config.model.num_groups if train.stratified else None
    streams = {"images": Rows(train.batch_size, train.accumulation, groups)}
    if config.trains_answers:
        streams["questions"] = Rows(train.answer_batch_size, train.accumulation)
    return {"pretrain": {"questions": Rows(pretrain.batch_size, pretrain.accumulation)}, "train": streams}


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Raises `UserError` unless weights and batches can be cut over the mesh."""
    names = {"questions": "answer_batch_size", "images": "batch_size"}
    try:
        if mesh.shape["expert"] != config.mesh.expert:  # which was -1, and so has not been checked
            dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh.shape))
        for stage, streams in stage_rows(config).items():
            for stream, rows in streams.items():
                name = "batch_size" if stage == "pretrain" else names[stream]
                if stage == "train" or config.pretrain.steps:
                    rows.check(mesh, f"{stage}.{name}")
        tensor = mesh.shape["tensor"]
        for tower in ("text", "vision"):
            heads = getattr(config.model, tower).num_heads
            if heads % tensor:
                raise ValueError(f"mesh.tensor={tensor} does not divide the {heads} query heads of model.{tower}")
        rules.shardings(mesh, abstract_params(config))
    except ValueError as error:
        raise UserError(f"config.mesh does not fit: {error}") from error


# ---- The first stage: language modelling of answers


def pretrain_plan(run: Run, key: jax.Array) -> StagePlan:
    """Trains the VLM, from random weights or another run's, to answer questions about images."""
    config, stage, model = run.config, run.config.pretrain, run.config.model_config
    init_key, step_key = jax.random.split(key)
    rows = stage_rows(config)["pretrain"]
    loss = AnswerLoss(model, jnp.dtype(config.dtype), stage.remat, stage.unroll)

    def evaluate(state: TrainState, log: MetricsLog) -> dict[str, Any]:
        return {"answer_accuracy": held_out_answers(run, state.average, config.eval.examples)}

    return StagePlan(
        name="pretrain",
        settings=stage,
        mesh=run.mesh,
        rows=rows,
        trained=abstract_params(config)["vlm"],
        init=lambda: first_vlm(config, init_key, run.mesh),
        step=make_train_step(stage, loss, rows, prepare=weigh_answers),
        key=step_key,
        frozen=None,
        batches=Streams(questions=question_batches(run, rows["questions"])),
        evaluate=evaluate,
        flops_per_example=TRAINING_PASSES * question_flops(config),
    )


def first_vlm(config: Config, key: jax.Array, mesh: Mesh) -> Params:
    """What the first stage starts from: another run's VLM, converted weights, or random ones."""
    if config.pretrain.init_from:
        source = open_vlm(config.pretrain.init_from, mesh)
        return source.vlm() if isinstance(source, Run) else source.params("float32", mesh)
    placed = rules.shardings(mesh, abstract_params(config)["vlm"])
    return jax.jit(lambda key: qwen2_vl.init(config.model_config.vlm, key), out_shardings=placed)(key)


def question_batches(run: Run, rows: Rows) -> Batches:
    data = run.config.data
    return Batches(
        open_source(run.config).questions("train", run.encoder),
        lambda records: question_batch(run.encoder, records, data.answer_length),
        batch_size=rows.batch_size,
        seed=run.config.seed,
        threads=data.threads,
        rows=rows.of_process(run.mesh),
    )


def question_flops(config: Config) -> int:
    text, vision = config.model.text, config.model.vision
    return flops.question(text, vision, config.data.answer_length, config.data.max_pixels // vision.patch_size**2)


def held_out_answers(run: Run, vlm: Params, examples: int) -> float:
    """The share of `examples` held-out questions that are answered right; 0: of all."""
    config = run.config
    return answer_accuracy(
        config.model_config.vlm,
        inference_weights(config, {"vlm": vlm}, run.mesh)["vlm"],
        run.encoder,
        open_source(config).questions("test", run.encoder),
        examples=examples,
        batch_size=config.eval.batch_size,
    )


# ---- The second stage: flow matching


def generation_plan(run: Run, key: jax.Array) -> StagePlan:
    """Trains the generation pathway, from the run's VLM or another run's pathway; in Blend the VLM's layers too."""
    config, encoder, source = run.config, run.encoder, open_source(run.config)
    stage, model = config.train, config.model_config
    init_key, step_key = jax.random.split(key)
    rows, loss, trained = stage_rows(config)["train"], flow_loss(config), abstract_trained(config)

    def read_fixed() -> Params:
        return latte_flow.split_trained(model, {"vlm": run.pretrained_vlm(config.dtype)})[1]

    # With contexts made ahead, training itself has no more use for the VLM, which is not kept between evaluations.
    frozen = frozen_inputs(config, encoder, source.captions, read_fixed(), run.mesh)
    make_batch = image_batcher(config, encoder, source.captions)
    held_out = HeldOutLoss(config, loss, source.drawings("test", encoder), make_batch, run.mesh)
    reader = DigitReader() if config.eval.scored_images else None
    stored = run.open_autoencoder()
    # Read now, when nothing is lost if it cannot be; kept on the host until an evaluation draws.
    autoencoder, decoder = stored.autoencoder, jax.device_get(stored.weights("decoder"))

    def init() -> Params:
        if stage.init_from:
            return Run.open(stage.init_from, run.mesh).trained(config)

        def fresh(vlm, key):
            return latte_flow.split_trained(model, latte_flow.init(model, vlm, key))[0]

        return jax.jit(fresh, out_shardings=rules.shardings(run.mesh, trained))(run.pretrained_vlm(), init_key)

    def evaluate(state: TrainState, log: MetricsLog) -> dict[str, Any]:
        losses = held_out(state.average, frozen)
        lengths = np.asarray(model.generation.intervals.lengths)
        metrics = {"held_out_loss": np.sum(losses * lengths), "held_out_loss_per_group": losses}
        params = functional.merge(frozen.params or read_fixed(), state.average)
        if config.trains_answers:
            metrics["answer_accuracy"] = held_out_answers(run, params["vlm"], config.eval.examples)
        weights = inference_weights(config, params, run.mesh)
        sampler = ImageSampler(model, autoencoder, encoder, weights, decoder, run.mesh)
        log.image(int(hosts.fetch(state.step)), "samples", sample_grid(config, sampler))
        if reader is not None:
            metrics |= reader.score(draw_digits(config, sampler, config.eval.scored_images, config.eval.sampling))
        return metrics

    batches = {
        "images": Batches(
            source.drawings("train", encoder),
            make_batch,
            batch_size=stage.batch_size,
            seed=config.seed,
            threads=config.data.threads,
            rows=rows["images"].of_process(run.mesh),
        )
    }
    if config.trains_answers:
        batches["questions"] = question_batches(run, rows["questions"])
    return StagePlan(
        name="train",
        settings=stage,
        mesh=run.mesh,
        rows=rows,
        trained=trained,
        init=init,
        step=flow_step(config, loss),
        key=step_key,
        frozen=frozen,
        batches=Streams(**batches),
        evaluate=evaluate,
        flops_per_example=generation_flops(config, len(source.captions)),
        profile=config.profile,
    )


def flow_loss(config: Config) -> FlowLoss:
    stage = config.train
    return FlowLoss(
        config.model_config,
        density=stage.flow_density,
        stratified=stage.stratified,
        prompt_dropout=stage.prompt_dropout,
        answer_weight=stage.answer_weight,
        dtype=jnp.dtype(config.dtype),
        remat=stage.remat,
        unroll=stage.unroll,
    )


def flow_step(config: Config, loss: FlowLoss) -> Callable:
    """The second stage's train step, see `make_train_step`."""
    model = config.model_config
    return make_train_step(
        config.train,
        loss,
        stage_rows(config)["train"],
        lambda gradients: {"grad_norm_per_group": norms_per_group(model, gradients)},
        prepare=weigh_answers,
    )


def frozen_inputs(config: Config, encoder: PromptEncoder, captions: Sequence[str], fixed: Params, mesh: Mesh) -> Frozen:
    """What the loss reads besides what it trains. Prompts that repeat are read once: in Couple here and now."""
    model, stage = config.model_config, config.train
    prompts = caption_prompts(config, encoder, captions if stage.share_contexts else ())
    if not stage.share_contexts:
        return rules.place(mesh, Frozen(fixed, unconditional=prompts))
    if config.trains_answers:
        return rules.place(mesh, Frozen(fixed, captions=prompts))
    # So many at a time, so that a thousand prompts do not need a thousand prompts' activations.
    starts = range(0, len(prompts.mask), PROMPTS_AT_A_TIME)
    tables = [
        read_prompts(model, fixed["vlm"], jax.tree.map(lambda x, i=i: x[i : i + PROMPTS_AT_A_TIME], prompts))
        for i in starts
    ]

    def joined(tables):
        layers = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *(table.layers for table in tables))
        mask, position = (jnp.concatenate(parts) for parts in zip(*(table[1:] for table in tables), strict=True))
        return Frozen({}, contexts=Context(layers, mask, position))

    return jax.jit(joined, out_shardings=rules.shardings(mesh, jax.eval_shape(joined, tables)))(tables)


def caption_prompts(config: Config, encoder: PromptEncoder, captions: Sequence[str]) -> Prompts:
    """The prompts of captions, and last the empty one."""
    prompts = [encoder.drawing(caption) for caption in captions]
    return encoder.batch([*prompts, encoder.unconditional()], config.data.prompt_length)


def generation_flops(config: Config, num_captions: int) -> float:
    """Of one image's share of a training step; captions that are read ahead of training are not in it."""
    model, stage, tokens = config.model_config, config.train, config.data.prompt_length
    reading = flops.reading(model.vlm.text, tokens)
    passes = TRAINING_PASSES * flops.velocity(model.generation, tokens)
    passes *= 1 if stage.stratified else config.model.num_groups
    reading *= TRAINING_PASSES if config.trains_answers else 1
    if not stage.share_contexts:
        passes += reading
    elif config.trains_answers:
        passes += reading * (num_captions + 1) * stage.accumulation / stage.batch_size
    if config.trains_answers:
        passes += TRAINING_PASSES * question_flops(config) * stage.answer_batch_size / stage.batch_size
    return passes


# ---- Samples


def sample_grid(config: Config, sampler: ImageSampler) -> Image.Image:
    """Draws the config's prompts, or where prompts are pictures one of each digit."""
    settings = config.eval
    if config.data.prompts == "captions":
        labels, prompts = settings.prompts, [sampler.encoder.drawing(prompt) for prompt in settings.prompts]
    else:
        labels = [f"{digits.REQUEST} {word}" for word in digits.WORDS]
        prompts = digits.requests(sampler.encoder, config.data.prompts)
    images = sampler(
        prompts,
        settings.sampling,
        images_per_prompt=settings.images_per_prompt,
        batch_size=settings.batch_size,
        seed=config.seed,
    )
    return labelled_grid(images, labels)


def draw_digits(config: Config, sampler: ImageSampler, count: int, sampling: Sampling) -> np.ndarray:
    """Draws `count` images, zeros first, as many of each digit."""
    return sampler(
        digits.requests(sampler.encoder, config.data.prompts),
        sampling,
        images_per_prompt=count // len(digits.WORDS),
        batch_size=config.eval.batch_size,
        seed=config.seed,
    )
