"""The second stage: flow matching."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from lattejax.configuration import Config
from lattejax.data.examples import image_batcher, seen_drawings
from lattejax.data.pipeline import Batches, Streams
from lattejax.data.prompts import PromptEncoder
from lattejax.evaluation.held_out import HeldOutLoss
from lattejax.evaluation.protocol import Report, Subject
from lattejax.evaluation.registry import due, open_evaluators, take_scores
from lattejax.models import functional, latte_flow
from lattejax.models.functional import Params
from lattejax.models.generation import Context
from lattejax.models.qwen2_vl import Prompts
from lattejax.objectives.answers import weigh_answers
from lattejax.objectives.flow import FlowLoss, Frozen, clip_per_group, norms_per_group
from lattejax.parallel import hosts, rules
from lattejax.runs.data import open_data
from lattejax.runs.inference import inference_weights
from lattejax.runs.run import Run
from lattejax.runs.shapes import abstract_trained
from lattejax.sampling.images import read_prompts
from lattejax.training.costs import generation_flops
from lattejax.training.layout import stage_rows
from lattejax.training.loop import StageRecipe
from lattejax.training.step import TrainState, make_train_step
from lattejax.training.vlm_stage import question_batches


def generation_recipe(run: Run, key: jax.Array) -> StageRecipe:
    """Trains the generation pathway, from the run's VLM or another run's pathway; in Blend also the VLM's layers."""
    config, encoder, source = run.config, run.encoder, open_data(run.config)
    stage, model = config.train, config.model_config
    init_key, step_key = jax.random.split(key)
    rows, loss, trained = stage_rows(config)["train"], flow_loss(config), abstract_trained(config)

    def read_fixed() -> Params:
        return latte_flow.split_trained(model, {"vlm": run.pretrained_vlm(config.dtype)})[1]

    # If contexts are computed in advance, training no longer needs the VLM: it is not kept between evaluations.
    frozen = frozen_inputs(config, encoder, source.captions, read_fixed(), run.mesh)
    drawings, held_out_drawings = (source.drawings(split, encoder) for split in ("train", "test"))
    make_batch = image_batcher(config, encoder, source.captions, drawings.bounds)
    held_out = HeldOutLoss(config, loss, held_out_drawings, make_batch, run.mesh)
    scheduled = open_evaluators(config, source)
    stored = run.open_autoencoder()
    # Read now, so that an unreadable autoencoder costs no work; kept on the host until an evaluation draws.
    autoencoder, decoder = stored.autoencoder, jax.device_get(stored.weights("decoder"))

    def init() -> Params:
        if stage.init_from:
            return Run.open(stage.init_from, run.mesh).trained(config)

        def fresh(vlm, key):
            return latte_flow.split_trained(model, latte_flow.init(model, vlm, key))[0]

        return jax.jit(fresh, out_shardings=rules.shardings(run.mesh, trained))(run.pretrained_vlm(), init_key)

    def evaluate(state: TrainState) -> Report:
        def weights() -> Params:
            params = functional.merge(frozen.params or read_fixed(), state.average)
            return inference_weights(config, params, run.mesh)

        def losses() -> Float[np.ndarray, "K"]:
            return held_out(state.average, frozen)

        penalty, opened = run.generation.repetition_penalty, (autoencoder, decoder)
        subject = Subject(config, source, encoder, run.mesh, weights, losses, lambda: opened, penalty)
        return take_scores(due(scheduled, "train", int(hosts.fetch(state.step))), subject)

    seen = seen_drawings(config, drawings)
    if seen is not None and hosts.is_first():
        left_out = len(drawings) - len(seen)
        print(f"data.unseen leaves out {left_out:,} of {len(drawings):,} captioned pictures", flush=True)
    batches = {
        "images": Batches(
            drawings,
            make_batch,
            batch_size=stage.batch_size,
            seed=config.seed,
            threads=config.data.threads,
            rows=rows["images"].of_process(run.mesh),
            chosen=seen,
        )
    }
    if config.trains_answers:
        batches["questions"] = question_batches(run, rows["questions"])
    return StageRecipe(
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
        overlap=stage.interval_overlap,
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
        clip=clip_per_group(model, config.train.clip_norm) if config.train.clip_by == "group" else None,
    )


def frozen_inputs(config: Config, encoder: PromptEncoder, captions: Sequence[str], fixed: Params, mesh: Mesh) -> Frozen:
    """The frozen inputs of the loss, see `make_frozen`."""
    shared = captions if config.train.share_contexts else ()
    return make_frozen(config, mesh, fixed, caption_prompts(config, encoder, shared))


def make_frozen(config: Config, mesh: Mesh, fixed: Params, prompts: Prompts) -> Frozen:
    """The frozen inputs of the loss. The contexts of repeated prompts are computed once; in Couple, here.

    Args:
      config: the run's config.
      mesh: the mesh to place them on.
      fixed: the VLM's weights that the second stage does not train, in the dtype of the computation.
      prompts: the captions with shared contexts, and last the empty prompt.
    """
    model = config.model_config
    if not config.train.share_contexts:
        return rules.place(mesh, Frozen(fixed, unconditional=prompts))
    if config.trains_answers:
        return rules.place(mesh, Frozen(fixed, captions=prompts))
    # In batches, so that a thousand prompts do not need the activations of a thousand prompts at once.
    starts = range(0, len(prompts.mask), latte_flow.PROMPTS_AT_A_TIME)
    tables = [
        read_prompts(model, fixed["vlm"], jax.tree.map(lambda x, i=i: x[i : i + latte_flow.PROMPTS_AT_A_TIME], prompts))
        for i in starts
    ]

    def joined(tables):
        layers = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *(table.layers for table in tables))
        mask, position = (jnp.concatenate(parts) for parts in zip(*(table[1:] for table in tables), strict=True))
        return Frozen({}, contexts=Context(layers, mask, position))

    return jax.jit(joined, out_shardings=rules.shardings(mesh, jax.eval_shape(joined, tables)))(tables)


def caption_prompts(config: Config, encoder: PromptEncoder, captions: Sequence[str]) -> Prompts:
    """The prompts of the captions, and last the empty prompt."""
    prompts = [encoder.drawing(caption) for caption in captions]
    return encoder.batch([*prompts, encoder.unconditional()], config.data.prompt_length)
