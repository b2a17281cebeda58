"""The programs of training and sampling, and the shapes of their inputs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lattejax.configuration import Config
from lattejax.data.examples import image_arrays
from lattejax.data.prompts import prompt_arrays, question_arrays
from lattejax.flow.schedule import split_steps
from lattejax.models import functional, latte_flow
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import Prompts
from lattejax.objectives.flow import Frozen
from lattejax.parallel import rules
from lattejax.parallel.mesh import row_shares
from lattejax.parallel.rows import Rows
from lattejax.runs.inference import sampling_axes
from lattejax.runs.shapes import abstract_params, abstract_trained
from lattejax.sampling.images import draw_latents
from lattejax.sampling.padding import bucket, padded_length
from lattejax.training.generation_stage import flow_loss, flow_step, make_frozen
from lattejax.training.layout import stage_rows
from lattejax.training.step import abstract_state, compile_for

# ---- Their inputs


def abstract_prompts(config: Config, rows: int, length: int, pictures: int = 0) -> Prompts:
    """Describes a batch of prompts, each with a number of pictures of the largest size."""
    vision = config.model.vision
    merged = config.data.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
    images = (pictures, merged * vision.spatial_merge_size**2, vision.patch_dim)
    return prompt_arrays(rows, length, images, jax.ShapeDtypeStruct)


def abstract_frozen(config: Config, mesh: Mesh, captions: int) -> Frozen:
    """Describes the frozen inputs of the loss; `captions` is the number of captions, if contexts are shared."""
    fixed = _cast(config, latte_flow.split_trained(config.model_config, {"vlm": abstract_params(config)["vlm"]})[1])
    prompts = abstract_prompts(config, 1 + captions * config.train.share_contexts, config.data.prompt_length)
    return jax.eval_shape(functools.partial(make_frozen, config, mesh), fixed, prompts)


def abstract_batch(config: Config) -> dict[str, Any]:
    """Describes a complete batch of the second stage, with its rows on one axis."""
    stage, data, make = config.train, config.data, jax.ShapeDtypeStruct

    def prompts() -> Prompts:
        return abstract_prompts(config, stage.batch_size, data.prompt_length, int(data.prompts == "pictures"))

    batch = {"images": image_arrays(config, stage.batch_size, prompts, make)}
    if config.trains_answers:
        questions = abstract_prompts(config, stage.answer_batch_size, data.answer_length, pictures=1)
        batch["questions"] = question_arrays(questions, make)
    return batch


def _cast(config: Config, params: Params) -> Params:
    return jax.eval_shape(functools.partial(functional.cast_floats, dtype=config.dtype), params)


# ---- The programs


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function, the shapes of its arguments, and by name those trees among them that take memory."""

    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    static: dict[str, Any]
    parts: dict[str, Any]

    def compile(self) -> jax.stages.Compiled:
        return self.function.lower(*self.arguments, **self.static).compile()


def train_step(config: Config, mesh: Mesh, captions: int) -> Program:
    """The second stage's train step."""
    rows, stage = stage_rows(config)["train"], config.train
    state = abstract_state(stage, abstract_trained(config), mesh)
    frozen = rules.abstract(mesh, abstract_frozen(config, mesh, captions))
    batch = {name: rows[name].abstract(mesh, stream) for name, stream in abstract_batch(config).items()}
    key = rules.abstract(mesh, jax.eval_shape(lambda: jax.random.key(0)))
    step = compile_for(mesh, flow_step(config, flow_loss(config)), state, frozen, rows)
    parts = {"parameters": state.params, "average": state.ema, "optimizer": state.optimizer}
    return Program(step, (state, frozen, batch, key), {}, parts | {"frozen": frozen, "batch": batch})


def sampling_call(config: Config, mesh: Mesh) -> Program:
    """A sampling call of eval.batch_size images, as `ImageSampler` makes it for the config's maximum prompt length."""
    model, shares = config.model_config, row_shares(mesh)
    size = -(-config.eval.batch_size // shares) * shares
    params = _cast(config, abstract_params(config))
    params = jax.eval_shape(latte_flow.unstack, params)
    vlm = rules.abstract(mesh, params["vlm"], sampling_axes("vlm"))
    pathway = rules.abstract(mesh, latte_flow.pathway(model, params), sampling_axes("experts"))
    prompts = bucket(len(config.eval.prompts) + 1)
    described = abstract_prompts(config, prompts, padded_length(config.data.prompt_length))
    contexts = jax.eval_shape(functools.partial(latte_flow.read_prompts, model), vlm, described)
    contexts = rules.abstract(mesh, contexts, axes=())
    flat = Rows.flat_sharding(mesh)
    which = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=flat)
    noise = jax.ShapeDtypeStruct((size, *config.data.latent_shape), jnp.float32, sharding=flat)
    guidance = jax.ShapeDtypeStruct((), jnp.float32, sharding=rules.replicated(mesh))
    segments = split_steps(model.generation.intervals, config.eval.sampling)
    parts = {"parameters": pathway, "vlm": vlm, "frozen": contexts, "batch": (which, noise)}
    arguments = (model, pathway, contexts, which, which, noise, guidance)
    return Program(draw_latents, arguments, {"segments": segments}, parts)
