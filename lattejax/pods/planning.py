"""Plans a config's run on a pod without having one, by compiling its programs for the pod's chips.

From the compiled program: the memory of arrays and temporaries on a chip, and the collectives. In closed form: model
FLOPs. From the chips' data sheets: their rates. The resulting time is a lower bound, not a forecast.
"""

import dataclasses
import math
from typing import Any

import jax

from lattejax.configuration import Config
from lattejax.errors import UserError, first_line
from lattejax.flow.schedule import split_steps
from lattejax.models import flops
from lattejax.parallel import collectives
from lattejax.parallel.memory import GIB, bytes_beyond_arguments, bytes_per_device
from lattejax.parallel.mesh import make_mesh
from lattejax.pods import programs
from lattejax.pods.chips import open_topology
from lattejax.sampling.padding import padded_length
from lattejax.training.costs import generation_flops
from lattejax.training.layout import check_mesh


def make_plan(config: Config, topology: str, captions: int, sample: bool = False) -> dict[str, Any]:
    """Compiles a config's train step, or its sampler, for a topology, and returns the plan.

    Args:
      config: the config; its mesh is made of the topology's chips.
      topology: e.g. "v5e:16x16".
      captions: the number of distinct captions, if `train.share_contexts` is set.
      sample: plan a sampling call instead of a train step.

    Raises:
      UserError: topology or mesh do not fit, libtpu is missing, or the compiler runs out of the chip's memory.
    """
    chip, devices = open_topology(topology)
    try:
        mesh = make_mesh(dataclasses.asdict(config.mesh), devices)
    except ValueError as error:
        raise UserError(f"config.mesh on {topology}: {error}") from error
    check_mesh(config, mesh)
    program = programs.sampling_call(config, mesh) if sample else programs.train_step(config, mesh, captions)
    try:
        compiled, parts = program.compile(), program.parts
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"{topology} has too little memory: {first_line(error)}") from error

    memory = compiled.memory_analysis()
    hbm = {name: bytes_per_device(tree) / GIB for name, tree in parts.items()}
    arguments = sum(size for name, size in hbm.items() if name != "vlm")  # the VLM has read the prompts before
    hbm["padding"] = memory.argument_size_in_bytes / GIB - arguments
    hbm["activations"] = bytes_beyond_arguments(memory) / GIB
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


ASSUMPTIONS = """compiled: memory, collectives and their counts, for exactly these chips and this mesh
in closed form: model FLOPs, without recomputation
from the data sheet: the chip's rates, with links in all directions busy at once
assumed: each array is read or written once, each temporary written and read once; compute, memory and links overlap
  perfectly. So no step is shorter than this; only a measurement on a chip can show how much longer it is
not included: reading data, evaluations, checkpoints; for a sampling call, reading prompts and decoding images"""


def describe(plan: dict[str, Any]) -> str:
    """The plan as readable text."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    call = "step" if plan["program"] == "train" else "call"
    lines = [
        f"{plan['topology']}: {plan['chips']} chips as {mesh}; {plan['images']:,} images per {call}",
        "",
        f"memory per chip              {plan['hbm_gib']:8.2f} GiB of {plan['hbm_capacity_gib']}",
        *(f"  {name:26} {size:8.2f} GiB" for name, size in plan["hbm_parts_gib"].items()),
        f"model FLOPs per chip, {call}   {plan['tflops_per_chip']:8.2f} TFLOP",
        f"sent per chip and {call}       {plan['collective_bytes'] / GIB:8.3f} GiB",
        *(
            f"  {kind:26} {one['sent_bytes'] / GIB:8.3f} GiB in {one['count']:,}"
            for kind, one in plan["collectives"].items()
        ),
        f"a {call} takes at least        {1e3 * plan['step_seconds_lower_bound']:8.1f} ms",
        *(f"  by {bound:23} {1e3 * seconds:8.1f} ms" for bound, seconds in plan["bounds_seconds"].items()),
        f"so at most                   {plan['images_per_second']:8,.0f} images per second",
    ]
    if plan["program"] == "train":
        lines.append(f"all of train.steps, at least {plan['days']:8.2f} days")
    return "\n".join([*lines, "", ASSUMPTIONS])


def sampler_flops(config: Config, size: int) -> float:
    """The FLOPs of a sampling call, in closed form."""
    model = config.model_config.generation
    segments = split_steps(model.intervals, config.eval.sampling)
    stages = sum(len(one.steps) * (1 + one.guided) * (1 + (one.solver == "heun")) for one in segments)
    return size * stages * flops.velocity(model, padded_length(config.data.prompt_length))
