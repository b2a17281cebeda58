"""Draws images; repeat --prompt to draw several, in order:

python -m lattejax.sample --workdir=runs/digits --prompt="a handwritten seven" --num=16 --out=sevens.png

Steps, guidance scale, guidance interval, solver and shift are by default those of the run's config.eval.
"""

import dataclasses
import math

import numpy as np
from absl import flags

from lattejax import cli
from lattejax.data.images import open_image
from lattejax.errors import UserError
from lattejax.files import output_file, write_with
from lattejax.flow.schedule import Guidance, NumSteps, Sampling, Shift
from lattejax.flow.solvers import SOLVERS
from lattejax.parallel import hosts, memory
from lattejax.ranges import Seed, Size
from lattejax.runs.run import Run
from lattejax.sampling.grid import grid_size, labelled_grid
from lattejax.sampling.images import ImageSampler

WORKDIR = cli.define_path("workdir", None, "A run's directory, an export, or hf://owner/name.")
AUTOENCODER = cli.define_path("autoencoder", None, "The run's autoencoder, if it has moved.")
PROMPT = flags.DEFINE_multi_string("prompt", None, "What to draw; repeatable.")
IMAGE = cli.define_paths("image", "An image file that every prompt is conditioned on; repeatable.")
NEGATIVE_PROMPT = flags.DEFINE_multi_string(
    "negative_prompt",
    [],
    "What guidance steers away from, instead of the empty prompt: one for all prompts, or one for each.",
)
NUM = cli.define_number("num", 16, "Images per prompt.", Size)
STEPS = cli.define_number("steps", None, "Sampling steps.", NumSteps)
GUIDANCE = cli.define_number("guidance", None, "Guidance scale; 1: no guidance.", Guidance)
GUIDANCE_INTERVAL = flags.DEFINE_list(
    "guidance_interval", None, "Only steps that start between these flow times are guided; 0 is noise."
)
SOLVER = flags.DEFINE_enum("solver", None, list(SOLVERS), "The ODE solver; a Heun step costs two velocities.")
SHIFT = cli.define_number(
    "shift", None, "Shifts the step times: below 1 towards the noise, above 1 towards the image.", Shift
)
CHECKPOINT = cli.define_checkpoint()
SEED = cli.define_number("seed", 0, "Seed of the noise.", Seed)
BATCH_SIZE = cli.define_number("batch_size", 64, "Images per batch.", Size)
OUT = cli.define_path("out", "samples.png", "The .png file to write the labelled grid to.")
NPZ = flags.DEFINE_bool("npz", False, "Also write arr_0, uint8 [prompts * num, height, width, 3], beside --out.")
MESH = flags.DEFINE_list("mesh", ["data=-1"], "The device mesh, e.g. data=2,fsdp=-1; images are divided among devices.")
connect = cli.define_cluster_flags()
flags.mark_flags_as_required(["workdir", "prompt"])


def read_sampling(usual: Sampling) -> Sampling:
    """The run's usual sampling, but for the flags that are given."""
    given = dict(num_steps=STEPS.value, guidance=GUIDANCE.value, solver=SOLVER.value, shift=SHIFT.value)
    if GUIDANCE_INTERVAL.value is not None:
        try:
            low, high = map(float, GUIDANCE_INTERVAL.value)
        except ValueError as error:
            raise UserError(f"--guidance_interval={','.join(GUIDANCE_INTERVAL.value)} must be two numbers") from error
        given["guidance_interval"] = low, high
    try:
        return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UserError(f"--{error}") from error


def read_negative_prompts(sampling: Sampling) -> list[str]:
    """One for each prompt, or none."""
    given, count = NEGATIVE_PROMPT.value, len(PROMPT.value)
    if given and sampling.guidance == 1:
        raise UserError("--negative_prompt needs guidance: a --guidance other than 1")
    if len(given) not in (0, 1, count):
        raise UserError(
            f"--negative_prompt is given {len(given)} times, for {count} prompts: give one, or one for each"
        )
    return given * count if len(given) == 1 else given


def main() -> None:
    out = output_file(OUT.value, ".png")
    connect()
    run = Run.open(WORKDIR.value, cli.read_mesh(MESH.value), CHECKPOINT.value)
    sampling = read_sampling(run.config.eval.sampling)
    steer_away = read_negative_prompts(sampling)
    images = [run.encoder.read_image(open_image(path)) for path in IMAGE.value]
    prompts = [run.encoder.drawing(prompt, images) for prompt in PROMPT.value]
    negative = [run.encoder.drawing(prompt, images) for prompt in steer_away]
    count = len(prompts) * NUM.value
    shape = (run.config.data.image_size,) * 2
    # Each image is held twice: by itself, and in the grid, which enlarges small ones and has 4 bytes in each pixel.
    size = 3 * count * math.prod(shape) + 4 * math.prod(grid_size(shape, len(prompts), NUM.value))
    memory.check_fits(size, memory.machine_bytes(), f"drawing {count:,} images")
    sampler = ImageSampler.of(run, run.params(run.config.dtype), AUTOENCODER.value or "")
    settings = dict(images_per_prompt=NUM.value, batch_size=BATCH_SIZE.value, seed=SEED.value)
    images = sampler(prompts, sampling, negative=negative, **settings)
    if not hosts.is_first():
        return
    if NPZ.value:  # first, because it needs no more memory
        write_with(out.with_suffix(".npz"), lambda file: np.savez(file, arr_0=images))
    write_with(out, lambda file: labelled_grid(images, PROMPT.value).save(file, format="PNG"))
    steps = [len(group) for group in sampler.config.generation.intervals.schedule(sampling.num_steps, sampling.shift)]
    print(f"{len(images)} images in {out}; guidance scale {sampling.guidance:g}, steps per group: {steps}")


if __name__ == "__main__":
    cli.run(main)
