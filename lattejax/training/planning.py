"""What a pod would do with a config, found out without one: the programs that would run are compiled for its chips.

Compiled and read off: what arrays and temporaries take on a chip, and which collectives there are. In closed form:
model FLOPs. From the chips' data sheets: their rates. The time that follows is a lower bound, not a forecast.
"""

import dataclasses
import functools
import importlib.metadata
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from packaging.requirements import Requirement

from lattejax.configuration import Config
from lattejax.errors import UserError
from lattejax.flow.schedule import plan_segments
from lattejax.models import flops, functional, latte_flow
from lattejax.models.functional import Params
from lattejax.models.generation import Context
from lattejax.models.qwen2_vl import Prompts
from lattejax.models.vision import Images
from lattejax.parallel import collectives, rules
from lattejax.parallel.mesh import make_mesh, row_shares
from lattejax.parallel.rows import Rows
from lattejax.sampling.images import draw_latents
from lattejax.sampling.padding import bucket, padded_length
from lattejax.training.objectives import Frozen
from lattejax.training.plans import check_mesh, flow_loss, flow_step, generation_flops, stage_rows
from lattejax.training.step import abstract_state, compile_for
from lattejax.weights.runs import abstract_params, abstract_trained, sampling_axes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, by Google's data sheets (cloud.google.com/tpu/docs); memory as its compiler states it."""

    hbm_gib: float
    teraflops: float  # bfloat16
    hbm_gigabytes_per_second: float
    ici_gigabytes_per_second: float  # sent, over all links together: half of the "bidirectional" figure


CHIPS = {
    "v4": Chip(30.75, 275, 1228, 300),
    "v5e": Chip(15.75, 197, 819, 200),
    "v5p": Chip(95.74, 459, 2765, 600),
    "v6e": Chip(31.25, 918, 1640, 400),
}


def open_topology(name: str) -> tuple[Chip, list[Any]]:
    """Returns the chip and the devices of a topology like "v5e:16x16".

    Raises:
      UserError: there is no such topology, or no libtpu.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise UserError(f"--topology={name} must be one of {', '.join(CHIPS)} and a shape, like v5e:4x4 or v5p:2x2x4")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it looks for a TPU's metadata server, and waits
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody takes a TPU from another by compiling
    check_compiler()
    try:
        return CHIPS[kind], list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--topology={name}: {str(error).splitlines()[0]}") from error


def pods_compiler() -> str:
    """The libtpu that `jax[tpu]` installs on a pod with this JAX, as a requirement: libtpu==0.0.42.*"""
    needs = map(Requirement, importlib.metadata.requires("jax") or ())
    return next(f"{one.name}{one.specifier}" for one in needs if one.name == "libtpu")


def check_compiler() -> None:
    """Raises `UserError` unless the compiler is here that a pod with this JAX has: another one makes other programs."""
    wanted = Requirement(pods_compiler())
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"a plan needs the TPU's compiler, which runs without a TPU: pip install --target=tpu_compiler '{wanted}', "
            "and put that directory on PYTHONPATH; in the environment itself it would slow every command down"
        ) from None
    if not wanted.specifier.contains(found):
        raise UserError(f"libtpu {found} is here, and a pod with JAX {jax.__version__} has {wanted}; install that")


# ---- What goes into the programs, by shape


def abstract_prompts(config: Config, rows: int, length: int, pictures: int = 0) -> Prompts:
    """Describes a batch of prompts, each with so many pictures of the largest size."""
    images = None
    if pictures:
        patches = config.data.max_pixels // config.model.vision.patch_size**2
        shape = (rows, pictures, patches)
        images = Images(
            jax.ShapeDtypeStruct((*shape, config.model.vision.patch_dim), jnp.float32),
            jax.ShapeDtypeStruct((*shape, 2), jnp.int32),
            jax.ShapeDtypeStruct(shape, bool),
            jax.ShapeDtypeStruct((rows, length), jnp.int32),
        )
    return Prompts(
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        jax.ShapeDtypeStruct((rows, length), bool),
        jax.ShapeDtypeStruct((rows, 3, length), jnp.int32),
        images,
    )


def abstract_contexts(config: Config, prompts: int) -> Context:
    """Describes the contexts of so many prompts, stacked, in the dtype of the computation."""
    vlm = _cast(config, abstract_params(config)["vlm"])
    described = abstract_prompts(config, prompts, config.data.prompt_length)
    return jax.eval_shape(functools.partial(latte_flow.read_prompts, config.model_config), vlm, described)


def abstract_frozen(config: Config, captions: int) -> Frozen:
    """Describes what `plans.frozen_inputs` makes."""
    length, model = config.data.prompt_length, config.model_config
    fixed = latte_flow.split_trained(model, {"vlm": abstract_params(config)["vlm"]})[1]
    fixed = _cast(config, fixed)
    if not config.train.share_contexts:
        return Frozen(fixed, unconditional=abstract_prompts(config, 1, length))
    if config.trains_answers:
        return Frozen(fixed, captions=abstract_prompts(config, captions + 1, length))
    return Frozen({}, contexts=abstract_contexts(config, captions + 1))


def abstract_batch(config: Config) -> dict[str, Any]:
    """Describes a whole batch of the second stage, its rows still on one axis."""
    stage, data = config.train, config.data
    images = {"latents": jax.ShapeDtypeStruct((stage.batch_size, *data.latent_shape), jnp.float32)}
    if stage.share_contexts:
        images["caption"] = jax.ShapeDtypeStruct((stage.batch_size,), jnp.int32)
    else:
        pictures = int(data.prompts == "pictures")
        images["prompts"] = abstract_prompts(config, stage.batch_size, data.prompt_length, pictures)
    batch = {"images": images}
    if config.trains_answers:
        rows, length = stage.answer_batch_size, data.answer_length
        weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)
        batch["questions"] = {"prompts": abstract_prompts(config, rows, length, 1), "target_weights": weights}
    return batch


def _cast(config: Config, params: Params) -> Params:
    return jax.eval_shape(functools.partial(functional.cast_floats, dtype=config.dtype), params)


# ---- The programs


def compile_train_step(config: Config, mesh: Mesh, captions: int) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """Compiles the second stage's train step; returns it with the trees that take memory, by name."""
    rows, stage = stage_rows(config)["train"], config.train
    state = abstract_state(stage, abstract_trained(config), mesh)
    frozen = rules.abstract(mesh, abstract_frozen(config, captions))
    batch = {name: rows[name].abstract(mesh, stream) for name, stream in abstract_batch(config).items()}
    key = rules.abstract(mesh, jax.eval_shape(lambda: jax.random.key(0)))
    step = compile_for(mesh, flow_step(config, flow_loss(config)), state, frozen, rows)
    compiled = step.lower(state, frozen, batch, key).compile()
    parts = {"parameters": state.params, "average": state.ema, "optimizer": state.optimizer}
    return compiled, parts | {"frozen": frozen, "batch": batch}


def compile_sampler(config: Config, mesh: Mesh) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """Compiles a sampling call of eval.batch_size images, as `ImageSampler` makes it of the longest prompts that the
    config allows; returns it as the train step."""
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
    segments = plan_segments(model.generation.intervals, config.eval.sampling)
    lowered = draw_latents.lower(model, pathway, contexts, which, noise, guidance, segments=segments)
    return lowered.compile(), {"parameters": pathway, "vlm": vlm, "frozen": contexts, "batch": (which, noise)}


def sampler_flops(config: Config, size: int) -> float:
    """Of a sampling call, in closed form."""
    model = config.model_config.generation
    segments = plan_segments(model.intervals, config.eval.sampling)
    stages = sum(len(one.steps) * (1 + one.guided) * (1 + (one.solver == "heun")) for one in segments)
    return size * stages * flops.velocity(model, padded_length(config.data.prompt_length))


# ---- The plan


def make_plan(config: Config, topology: str, captions: int, sample: bool = False) -> dict[str, Any]:
    """Compiles a config's train step, or its sampler, for a topology, and returns what follows from it.

    Args:
      config: the config, its mesh to be laid over the topology's chips.
      topology: as in "v5e:16x16".
      captions: how many distinct ones the data has, where `train.share_contexts` keeps their contexts.
      sample: a sampling call instead of a train step.

    Raises:
      UserError: topology or mesh do not fit, libtpu is missing, or the compiler finds that memory does not suffice.
    """
    chip, devices = open_topology(topology)
    try:
        mesh = make_mesh(dataclasses.asdict(config.mesh), devices)
    except ValueError as error:
        raise UserError(f"config.mesh on {topology}: {error}") from error
    check_mesh(config, mesh)
    try:
        compiled, parts = compile_sampler(config, mesh) if sample else compile_train_step(config, mesh, captions)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"{topology} has too little memory: {str(error).splitlines()[0][:300]}") from error

    memory = compiled.memory_analysis()
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    hbm = {name: _on_a_chip(tree) / GIB for name, tree in parts.items()}
    arguments = sum(size for name, size in hbm.items() if name != "vlm")  # which reads the prompts before
    hbm["padding"] = memory.argument_size_in_bytes / GIB - arguments
    hbm["activations"] = (memory.temp_size_in_bytes + output) / GIB
    hbm["program"] = memory.generated_code_size_in_bytes / GIB
    sent = collectives.traffic(compiled.as_text(), mesh.size)
    if sample:
        size = math.prod(parts["batch"][0].shape)
        total, steps = sampler_flops(config, size), 1
    else:
        size, steps = config.train.batch_size, config.train.steps
        total = generation_flops(config, captions) * size
    touched = memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes
    bounds = {
        "compute": total / mesh.size / (chip.teraflops * 1e12),
        "memory": touched / (chip.hbm_gigabytes_per_second * 1e9),
        "interconnect": sum(one.sent_bytes for one in sent.values()) / (chip.ici_gigabytes_per_second * 1e9),
    }
    seconds = max(bounds.values())
    return {
        "program": "sample" if sample else "train",
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "hbm_gib": sum(hbm.values()),
        "hbm_capacity_gib": chip.hbm_gib,
        "hbm_parts_gib": hbm,
        "tflops_per_chip": total / mesh.size / 1e12,
        "collectives": {kind: dataclasses.asdict(one) for kind, one in sorted(sent.items())},
        "collective_bytes": int(sum(one.sent_bytes for one in sent.values())),
        "bounds_seconds": bounds,
        "step_seconds_lower_bound": seconds,
        "images": size,
        "images_per_second": size / seconds,
        "days": steps * seconds / 86_400,
    }


def _on_a_chip(tree: Any) -> int:
    """Bytes that a tree's arrays take on one chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


ASSUMPTIONS = """compiled: memory, collectives and how often each runs, for exactly these chips and this mesh
in closed form: model FLOPs, recomputation not counted
by the data sheet: the chip's rates; that links in all directions are busy at once
assumed: arrays are read or written once, temporaries both, and nothing else is; the slowest of the three bounds hides
  the others. So no step is shorter than this; how much longer it is, only a chip can tell
not in it: reading data, evaluations, checkpoints; of a sampling call, reading the prompts and decoding the images"""


def describe(plan: dict[str, Any]) -> str:
    """The plan for a reader."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    call = "step" if plan["program"] == "train" else "call"
    lines = [
        f"{plan['topology']}: {plan['chips']} chips as {mesh}; {plan['images']:,} images a {call}",
        "",
        f"memory on a chip             {plan['hbm_gib']:8.2f} GiB of {plan['hbm_capacity_gib']}",
        *(f"  {name:26} {size:8.2f} GiB" for name, size in plan["hbm_parts_gib"].items()),
        f"model FLOPs, a chip and {call} {plan['tflops_per_chip']:8.2f} TFLOP",
        f"sent by a chip in a {call}     {plan['collective_bytes'] / GIB:8.3f} GiB",
        *(
            f"  {kind:26} {one['sent_bytes'] / GIB:8.3f} GiB in {one['count']:,}"
            for kind, one in plan["collectives"].items()
        ),
        f"a {call} takes at least        {1e3 * plan['step_seconds_lower_bound']:8.1f} ms",
        *(f"  by {bound:23} {1e3 * seconds:8.1f} ms" for bound, seconds in plan["bounds_seconds"].items()),
        f"so at most                   {plan['images_per_second']:8,.0f} images a second",
    ]
    if plan["program"] == "train":
        lines.append(f"and for all of train.steps   {plan['days']:8.2f} days at least")
    return "\n".join([*lines, "", ASSUMPTIONS])
