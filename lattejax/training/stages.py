"""The two stages of a run, one after the other: the VLM learns to read, then the generation pathway learns to draw."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.data import digits
from lattejax.data import tokenizer as tokenizers
from lattejax.data.pipeline import training_batches
from lattejax.data.prompts import PromptEncoder, question_batch
from lattejax.errors import UserError
from lattejax.evaluation.digits import answer_accuracy, generation_scores
from lattejax.files import write_whole
from lattejax.flow.intervals import Intervals
from lattejax.models import couple, flops, qwen2_vl
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import Prompts
from lattejax.sampling.grid import labelled_grid
from lattejax.sampling.images import ImageSampler, read_prompts
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.loop import StagePlan, run_stage
from lattejax.training.metrics import MetricsLog, RunClock
from lattejax.training.objectives import AnswerLoss, FlowLoss, Frozen, norms_per_group
from lattejax.training.step import TrainState, make_train_step
from lattejax.weights import checkpoints
from lattejax.weights.runs import Run, Workdir, abstract_generation, abstract_vlm, inference_weights, prompt_encoder

TRAINING_PASSES = 3  # in forward passes: a backward pass costs two


def train(config: Config, path: str | epath.Path, guard: InterruptGuard) -> dict[str, float]:
    """Trains both stages and scores the result; goes on where an interrupted run with the same config was.

    Returns the final scores, which are also in the workdir's `results.json`.

    Raises:
      UserError: the workdir belongs to another config, or the tokenizer does not fit the model.
      Interrupted: a signal came; everything is saved.
    """
    workdir = Workdir.at(path)
    refuse_another_config(config, workdir)
    encoder = prompt_encoder(config, find_tokenizer(config, workdir))
    check_fit(config, encoder)
    if not workdir.config.exists():
        tokenizers.save(encoder.tokenizer, workdir.tokenizer)
        configuration.save(config, workdir.config)
    clock = RunClock(workdir)
    pretrain_key, train_key = jax.random.split(jax.random.key(config.seed))

    # ---- Stage 1: the VLM
    if not checkpoints.is_complete(workdir.vlm):
        state = run_stage(pretrain_plan(config, encoder, pretrain_key), config, workdir, clock, guard)
        checkpoints.save_weights(workdir.vlm, state.ema)
    if workdir.checkpoints("pretrain").exists():
        workdir.checkpoints("pretrain").rmtree()  # from here on the VLM is stored once
    vlm = inference_weights(config, Run.open(workdir.path).vlm())

    # ---- Stage 2: the generation pathway
    sampler = ImageSampler(config.model_config, config.autoencoder, encoder, qwen2_vl.unstack(vlm))
    plan = generation_plan(config, workdir, encoder, vlm, sampler, train_key)
    state = run_stage(plan, config, workdir, clock, guard)

    # ---- The scores
    results = final_scores(config, encoder, sampler, inference_weights(config, state.ema))
    results["seconds"] = clock.seconds
    write_whole(workdir.results, (json.dumps(results, indent=2) + "\n").encode())
    return results


# ---- Before any work starts


def refuse_another_config(config: Config, workdir: Workdir) -> None:
    """Raises `UserError` if the workdir belongs to another config, and shows the difference."""
    if workdir.config.exists():
        different = configuration.differences(config, configuration.load(workdir.config))
        if different:
            raise UserError(
                f"{workdir.path} belongs to another config ({'; '.join(different)}); use another --workdir, "
                "or set init_from to start from its weights"
            )


def find_tokenizer(config: Config, workdir: Workdir) -> tokenizers.Tokenizer:
    """Returns the run's tokenizer: the saved one, else that of the run to start from, else the one that the config
    names, else one trained on the data's texts."""
    if tokenizers.is_saved(workdir.tokenizer):
        return tokenizers.load(workdir.tokenizer)
    if config.pretrain.init_from:
        return tokenizers.load(Run.open(config.pretrain.init_from).workdir.tokenizer)
    if config.tokenizer.path:
        return tokenizers.load(epath.Path(config.tokenizer.path))
    return tokenizers.train(digits.texts(), config.tokenizer.vocab_size)


def check_fit(config: Config, encoder: PromptEncoder) -> None:
    """Raises `UserError` if tokenizer, prompts or the weights to start from do not fit the config."""
    entries, room = len(encoder.tokenizer), config.model.text.vocab_size
    if entries > room:
        raise UserError(f"the tokenizer has {entries} entries, more than config.model.text.vocab_size={room}")
    caption_prompts(config, encoder)
    questions = digits.Questions("train", encoder)
    encoder.check_length((questions[i] for i in range(len(questions))), config.data.answer_length)
    for stage, abstract in ((config.pretrain, abstract_vlm), (config.train, abstract_generation)):
        if stage.init_from:
            theirs = abstract(Run.open(stage.init_from).config)
            checkpoints.check_shapes(theirs, abstract(config), f"the weights of {stage.init_from}")


# ---- The first stage: language modelling of answers


def pretrain_plan(config: Config, encoder: PromptEncoder, key: jax.Array) -> StagePlan:
    """Trains the VLM, from random weights or another run's, to answer questions about images."""
    stage, model = config.pretrain, config.model_config
    init_key, step_key = jax.random.split(key)

    def init() -> Params:
        if stage.init_from:
            return Run.open(stage.init_from).vlm(config)
        return qwen2_vl.init(model.vlm, init_key)

    def evaluate(state: TrainState, log: MetricsLog) -> dict[str, Any]:
        return {"answer_accuracy": held_out_answers(config, encoder, state.ema, config.eval.examples)}

    batches = training_batches(
        digits.Questions("train", encoder),
        lambda records: question_batch(encoder, records, config.data.answer_length),
        batch_size=stage.batch_size,
        seed=config.seed,
        threads=config.data.threads,
    )
    text, vision = model.vlm.text, model.vlm.vision
    patches = config.data.max_pixels // vision.patch_size**2
    return StagePlan(
        name="pretrain",
        settings=stage,
        abstract=abstract_vlm(config),
        init=init,
        step=make_train_step(stage, AnswerLoss(model, jnp.dtype(config.dtype), stage.remat, stage.unroll)),
        key=step_key,
        frozen=None,
        batches=batches,
        evaluate=evaluate,
        flops_per_example=TRAINING_PASSES * flops.question(text, vision, config.data.answer_length, patches),
    )


def held_out_answers(config: Config, encoder: PromptEncoder, vlm: Params, examples: int) -> float:
    weights = qwen2_vl.unstack(inference_weights(config, vlm))
    return answer_accuracy(
        config.model_config.vlm, weights, encoder, examples=examples, batch_size=config.eval.batch_size
    )


# ---- The second stage: flow matching


def caption_prompts(config: Config, encoder: PromptEncoder) -> Prompts:
    """The prompts of all captions, and last the empty one."""
    drawings = [encoder.drawing(caption) for caption in (*digits.CAPTIONS, "")]
    return encoder.batch(drawings, config.data.prompt_length)


def generation_plan(
    config: Config, workdir: Workdir, encoder: PromptEncoder, vlm: Params, sampler: ImageSampler, key: jax.Array
) -> StagePlan:
    """Trains the generation pathway, from a replica of the VLM or another run's pathway, beside the frozen `vlm`."""
    stage, model = config.train, config.model_config
    init_key, step_key = jax.random.split(key)
    intervals = Intervals.equal(config.model.num_groups)
    source = digits.CaptionedImages("train", config.autoencoder)
    held_out = digits.CaptionedImages("test", config.autoencoder)

    # Prompts repeat: their contexts are computed once. The empty prompt, for dropout, stands last.
    prompts = caption_prompts(config, encoder)
    table = read_prompts(model, vlm, prompts)
    if stage.share_contexts:
        frozen = Frozen(contexts=table)
    else:
        frozen = Frozen(vlm=vlm, unconditional=jax.tree.map(lambda x: x[-1:], prompts))

    def init() -> Params:
        if stage.init_from:
            return Run.open(stage.init_from).generation(config)
        return couple.init_generation(model, Run.open(workdir.path).vlm(), init_key)

    def make_batch(records: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        batch = {name: np.stack([record[name] for record in records]) for name in ("latents", "caption")}
        if not stage.share_contexts:
            batch["prompts"] = jax.tree.map(lambda x: x[batch["caption"]], prompts)
        return batch

    loss = FlowLoss(model, intervals, stage.prompt_dropout, jnp.dtype(config.dtype), stage.remat, stage.unroll)
    held_out_loss = jax.jit(loss.held_out)
    few = slice(config.eval.examples or None)

    def evaluate(state: TrainState, log: MetricsLog) -> dict[str, Any]:
        losses = held_out_loss(state.ema, table, held_out.latents[few], held_out.labels[few])
        images = sampler(
            inference_weights(config, state.ema),
            config.eval.prompts,
            images_per_caption=config.eval.images_per_prompt,
            num_steps=config.eval.sample_steps,
            guidance=config.eval.guidance,
            seed=config.seed,
            batch_size=config.eval.batch_size,
        )
        grid = labelled_grid(images, config.eval.prompts)
        log.image(int(state.step), "samples", grid)
        return {"held_out_loss": np.sum(losses * np.asarray(intervals.lengths)), "held_out_loss_per_group": losses}

    batches = training_batches(
        source, make_batch, batch_size=stage.batch_size, seed=config.seed, threads=config.data.threads
    )
    passes = flops.velocity(model.generation, config.data.prompt_length) * TRAINING_PASSES
    if not stage.share_contexts:
        passes += flops.reading(model.vlm.text, config.data.prompt_length)
    return StagePlan(
        name="train",
        settings=stage,
        abstract=abstract_generation(config),
        init=init,
        step=make_train_step(
            stage,
            loss,
            num_groups=intervals.num_groups,
            gradient_metrics=lambda g: {"grad_norm_per_group": norms_per_group(intervals.num_groups, g)},
        ),
        key=step_key,
        frozen=frozen,
        batches=batches,
        evaluate=evaluate,
        flops_per_example=passes,
        profile=config.profile,
    )


# ---- The end


def final_scores(config: Config, encoder: PromptEncoder, sampler: ImageSampler, generation: Params) -> dict[str, float]:
    """Scores answers and generated digits; see `evaluation.digits`."""
    per_digit = config.eval.final_images // len(digits.CAPTIONS)

    def draw(guidance: float) -> np.ndarray:
        return sampler(
            generation,
            digits.CAPTIONS,
            images_per_caption=per_digit,
            num_steps=config.eval.sample_steps,
            guidance=guidance,
            seed=config.seed,
            batch_size=config.eval.batch_size,
        )

    vlm = config.model_config.vlm
    accuracy = answer_accuracy(vlm, sampler.vlm, encoder, examples=0, batch_size=config.eval.batch_size)
    return {"answer_accuracy": accuracy} | generation_scores(draw, per_digit)
