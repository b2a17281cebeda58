"""A sweep: variants of one config, several seeds each, trained from one pretrained VLM and compared.

Its directory:

vlm/                  the run that pretrains the VLM
runs/<variant>_<seed>/  a run each
compilation_cache/    unless JAX has been told of another
sampling.json         scores and times of the finished runs by number of sampling steps
table.csv, table.md   the comparison, see `evaluation.comparison`
*.png                 its plots
"""

import copy
import dataclasses
import json
import re
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.errors import UserError
from lattejax.evaluation.comparison import write_comparison
from lattejax.evaluation.digits import DigitReader
from lattejax.files import write_whole
from lattejax.training.interrupt import Interrupted, InterruptGuard
from lattejax.training.plans import draw_digits
from lattejax.training.stages import pretrain, train
from lattejax.weights import checkpoints
from lattejax.weights.runs import Run, Workdir, abstract_params, inference_weights

KEYS = ("base", "variants", "seeds", "sample_steps")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep's config says: for each variant its name and its config, still without a seed and a VLM."""

    base: Config
    variants: dict[str, Config]
    seeds: tuple[int, ...]
    sample_steps: tuple[int, ...]


def resolve_sweep(config: ConfigDict) -> Sweep:
    """Checks a sweep's config as a whole, before anything is trained; raises `UserError`."""
    values = config.to_dict()
    if set(values) != set(KEYS):
        raise UserError(f"a sweep's config has the keys {', '.join(KEYS)}; this one has {', '.join(values)}")
    for name in ("seeds", "sample_steps"):
        numbers = values[name]
        if not numbers or len(set(numbers)) != len(numbers) or not all(type(n) is int and n >= 0 for n in numbers):
            raise UserError(f"config.{name}={numbers!r} must be different whole numbers")
    names = [name for name, _ in values["variants"]]
    if not names or len(set(names)) != len(names) or not all(re.fullmatch(r"\w+", name) for name in names):
        raise UserError(f"config.variants must have different names of letters, digits and underscores, not {names}")
    base = configuration.resolve(values["base"])
    variants = {name: _override(values["base"], name, overrides) for name, overrides in values["variants"]}
    vlm = abstract_params(base)["vlm"]
    for name, variant in variants.items():
        checkpoints.check_shapes(vlm, abstract_params(variant)["vlm"], f"variant {name}: the base config's VLM weights")
    return Sweep(base, variants, tuple(values["seeds"]), tuple(values["sample_steps"]))


def _override(base: dict[str, Any], name: str, overrides: dict[str, Any]) -> Config:
    values = copy.deepcopy(base)
    for key, value in overrides.items():
        configuration.check_key(key)
        *sections, last = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[last] = value
    try:
        return configuration.resolve(values)
    except UserError as error:
        raise UserError(f"variant {name}: {error}") from error


def run_sweep(sweep: Sweep, path: str | epath.Path, guard: InterruptGuard) -> str:
    """Trains what is not trained yet, scores, and returns the comparison's table as Markdown.

    Raises:
      UserError: a directory there belongs to another config.
      Interrupted: a signal came; everything is saved.
    """
    directory = Workdir.at(path).path
    if jax.config.jax_compilation_cache_dir is None:  # seeds of one variant compile the same programs
        jax.config.update("jax_compilation_cache_dir", str(directory / "compilation_cache"))
    pretrain(sweep.base, directory / "vlm", guard)
    runs = {}
    for seed in sweep.seeds:
        for name, variant in sweep.variants.items():
            workdir = Workdir(directory / "runs" / f"{name}_{seed}")
            runs[name, seed] = _train(variant, seed, directory / "vlm", workdir, guard)
    _sample(sweep, {name: runs[name, sweep.seeds[0]] for name in sweep.variants}, directory / "sampling.json", guard)
    return write_comparison(directory, runs)


def _train(variant: Config, seed: int, vlm: epath.Path, workdir: Workdir, guard: InterruptGuard) -> Run:
    """Trains one run, unless it has finished."""
    pretrained = dataclasses.replace(variant.pretrain, init_from=str(vlm), steps=0)
    config = dataclasses.replace(variant, seed=seed, pretrain=pretrained)
    print(f"---- {workdir.path.name}", flush=True)
    if not workdir.results.exists() or configuration.load(workdir.config) != config:
        train(config, workdir.path, guard)
    return Run.open(workdir.path)


def _sample(sweep: Sweep, runs: dict[str, Run], path: epath.Path, guard: InterruptGuard) -> None:
    """Draws from one run of each variant at each number of steps; writes scores, and seconds an image.

    The draws of all variants alternate, so that a machine whose speed drifts is as fast for one as for the other; a
    draw's time is the median over its batches, context pass included and compilation not.
    """
    done = json.loads(path.read_text()) if path.exists() else []
    if {(record["variant"], record["steps"]) for record in done} == {
        (name, steps) for name in runs for steps in sweep.sample_steps
    }:
        return
    reader = DigitReader()
    weights = {name: inference_weights(run.config, run.params()) for name, run in runs.items()}
    cells = [(name, steps) for name in runs for steps in sweep.sample_steps]
    images, seconds = ({cell: [] for cell in cells} for _ in range(2))

    def draw(name: str, steps: int, batch: int) -> tuple[np.ndarray, float]:
        run = runs[name]
        config = dataclasses.replace(run.config, seed=batch)
        sampling = dataclasses.replace(config.eval.sampling, num_steps=steps)
        started = time.perf_counter()
        drawn = draw_digits(config, run.encoder, weights[name], config.eval.batch_size, sampling)
        return drawn, (time.perf_counter() - started) / len(drawn)

    for name, steps in cells:
        draw(name, steps, batch=0)  # compiles
        if guard.signum is not None:
            raise Interrupted(guard.signum)
    for batch in range(-(-sweep.base.eval.final_images // sweep.base.eval.batch_size)):
        for cell in cells:
            drawn, per_image = draw(*cell, batch=batch)
            images[cell].append(drawn)
            seconds[cell].append(per_image)
            if guard.signum is not None:
                raise Interrupted(guard.signum)
    records = []
    for name, steps in cells:
        # Each batch has as many of each digit, zeros first: so must the whole have.
        drawn = np.stack(images[name, steps])
        by_digit = drawn.reshape(len(drawn), 10, -1, *drawn.shape[2:]).swapaxes(0, 1).reshape(-1, *drawn.shape[2:])
        timed = {"variant": name, "steps": steps, "seconds_per_image": float(np.median(seconds[name, steps]))}
        records.append(timed | reader.score(by_digit))
    write_whole(path, (json.dumps(records, indent=2) + "\n").encode())
