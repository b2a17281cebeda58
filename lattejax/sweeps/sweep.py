"""A sweep: variants of one config, several seeds each, trained from one pretrained VLM and compared.

Its directory:

vlm/                    the run that pretrains the VLM
runs/<variant>_<seed>/  a run for each variant and seed
sampling.json           scores and times by number of sampling steps, for each variant's run with the first seed
table.csv, table.md     the comparison, see `sweeps.comparison`
*.png                   its plots
"""

import contextlib
import copy
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.data.prompts import prompt_encoder
from lattejax.errors import UserError, parsing
from lattejax.evaluation.protocol import DrawingScore
from lattejax.evaluation.registry import drawing_scores, open_evaluators
from lattejax.files import check_writable, read_json, remove_leftovers, write_atomically
from lattejax.flow.schedule import NumSteps
from lattejax.interrupts import Interrupted
from lattejax.leases import one_writer
from lattejax.ranges import Seed, range_of
from lattejax.runs.data import open_data
from lattejax.runs.geometry import resolve_config
from lattejax.runs.run import Run, open_mesh
from lattejax.runs.shapes import abstract_params
from lattejax.runs.workdir import Workdir
from lattejax.sampling.images import ImageSampler
from lattejax.sweeps.comparison import write_comparison
from lattejax.training.checks import changes, check_fit, check_lengths, check_unseen, find_tokenizer
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.layout import check_mesh
from lattejax.training.stages import pretrain, train
from lattejax.weights import trees
from lattejax.weights.autoencoders import StoredAutoencoder

KEYS = ("base", "variants", "seeds", "sample_steps")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A resolved sweep config: for each variant its name and its config, with seed and VLM not set yet."""

    base: Config
    variants: dict[str, Config]
    seeds: tuple[int, ...]
    sample_steps: tuple[int, ...]


def resolve_sweep(config: ConfigDict) -> Sweep:
    """Checks a complete sweep config, before anything is trained; raises `UserError`."""
    with parsing("the sweep's config"):
        return _resolve(configuration.to_dict(config))


def _resolve(values: dict[str, Any]) -> Sweep:
    if set(values) != set(KEYS):
        raise UserError(f"a sweep's config has the keys {', '.join(KEYS)}; this one has {', '.join(values)}")
    for name, (_, allowed) in (("seeds", range_of(Seed)), ("sample_steps", range_of(NumSteps))):
        given = values[name]
        if not given or len(set(given)) != len(given) or not all(type(n) is int and n in allowed for n in given):
            raise UserError(f"config.{name}={given!r} must be different integers, {allowed}")
    names = [name for name, _ in values["variants"]]
    if not names or len(set(names)) != len(names) or not all(re.fullmatch(r"\w+", name) for name in names):
        raise UserError(f"config.variants must have different names of letters, digits and underscores, not {names}")
    base = resolve_config(values["base"])
    _refuse_trained_pathway(base)
    variants = {name: _override(values["base"], name, overrides) for name, overrides in values["variants"]}
    vlm = abstract_params(base)["vlm"]
    for name, variant in variants.items():
        trees.check_shapes(vlm, abstract_params(variant)["vlm"], f"variant {name}: the base config's VLM weights")
        score, batch = drawing_score(variant, name), variant.eval.batch_size
        if batch % score.num_prompts or score.images % batch:
            raise UserError(
                f"variant {name}: eval.batch_size={batch} must be a multiple of the {score.num_prompts} scored "
                f"prompts, and divide the {score.images} scored images"
            )
        if not variant.train.steps:
            raise UserError(f"variant {name}: train.steps=0 trains nothing to compare")
    sweep = Sweep(base, variants, tuple(values["seeds"]), tuple(values["sample_steps"]))
    _warn_of_idle_groups(sweep)
    return sweep


def _refuse_trained_pathway(config: Config) -> None:
    if config.train.init_from:
        raise UserError(
            f"train.init_from={config.train.init_from!r} does not fit a sweep, whose runs start from its own VLM; "
            "leave it empty"
        )


def _warn_of_idle_groups(sweep: Sweep) -> None:
    """Warns, in a line for each variant, of the numbers of steps with which a group takes none."""
    for name, variant in sweep.variants.items():
        intervals, idle = variant.model_config.generation.intervals, []
        for steps in sweep.sample_steps:
            taken = intervals.schedule(steps, variant.eval.shift)
            if without := [str(group) for group, own in enumerate(taken) if not own]:
                idle.append(f"{steps} steps: {', '.join(without)}")
        if idle:
            logging.warning(
                "variant %s: some groups take no step when it draws with few (%s); its images there tell little",
                name,
                "; ".join(idle),
            )


def drawing_score(config: Config, name: str) -> DrawingScore:
    """The score of a variant's drawings; raises `UserError` if there is none, or the held-out loss is not taken."""
    if config.eval.evaluators.get("held_out_loss", {"at": "never"}).get("at", "training") != "training":
        raise UserError(f"variant {name}: a sweep compares held-out losses; list held_out_loss in eval.evaluators")
    score = next(drawing_scores(open_evaluators(config, open_data(config))), None)
    if score is None:
        raise UserError(
            f"variant {name}: a sweep compares drawings, but has no score of them; list one in eval.evaluators, with "
            "at='end'"
        )
    return score


def _override(base: dict[str, Any], name: str, overrides: dict[str, Any]) -> Config:
    values = copy.deepcopy(base)
    for key, value in overrides.items():
        configuration.check_key(key)
        if key == "seed" or key.startswith(("pretrain.", "tokenizer.")):
            raise UserError(f"variant {name}: {key} is the same for all runs of a sweep; set it in config.base")
        *sections, last = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[last] = value
    with _naming(name):
        variant = resolve_config(values)
        _refuse_trained_pathway(variant)
    return variant


@contextlib.contextmanager
def _naming(variant: str) -> Iterator[None]:
    """Within it, an error of the user's names the variant."""
    try:
        yield
    except UserError as error:
        raise UserError(f"variant {variant}: {error}") from error


def run_sweep(sweep: Sweep, path: epath.PathLike, guard: InterruptGuard) -> str:
    """Trains the runs that are not finished, scores them, and returns the comparison's table as Markdown.

    Raises:
      UserError: one of the runs' directories belongs to another config.
      Interrupted: on a signal; all training is saved.
    """
    directory = Workdir.at(path).path
    if (directory / "config.json").exists():
        raise UserError(f"{directory} is the workdir of a run; use another --workdir for the sweep")
    check_writable(directory / "table.csv", f"--workdir={directory}")
    with one_writer(directory / ".sweep", f"the sweep {directory}"):
        remove_leftovers(directory)
        return _run_sweep(sweep, directory, guard)


def _run_sweep(sweep: Sweep, directory: epath.Path, guard: InterruptGuard) -> str:
    source = open_data(sweep.base)
    tokenizer = find_tokenizer(sweep.base, Workdir(directory / "vlm"), source)
    for name, variant in sweep.variants.items():
        with _naming(name):
            check_mesh(variant, open_mesh(variant))
    for variant in {variant.data: variant for variant in sweep.variants.values()}.values():
        encoder = prompt_encoder(variant, tokenizer)
        check_fit(variant, encoder, StoredAutoencoder.open_for(variant.data).identity)
        if not (directory / "vlm" / "config.json").exists():
            check_unseen(variant, encoder, open_data(variant))
        check_lengths(variant, encoder, open_data(variant))
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
    if workdir.config.exists():
        theirs = configuration.load(workdir.config)
        # The sweep's directory may have moved since the run was started.
        moved = dataclasses.replace(theirs, pretrain=dataclasses.replace(theirs.pretrain, init_from=str(vlm)))
        is_same = not changes(config, moved)
        if is_same and workdir.results.exists():
            return Run.open(workdir.path)
        if is_same and moved != theirs:
            with workdir.writing():
                configuration.save(moved, workdir.config)
    train(config, workdir.path, guard)
    return Run.open(workdir.path)


def _sample(sweep: Sweep, runs: dict[str, Run], path: epath.Path, guard: InterruptGuard) -> None:
    """Draws images with one run of each variant and each number of steps; writes scores and seconds per image.

    The variants alternate, so that a drift in the machine's speed affects all of them equally. A time is the median
    over batches, with the context pass but without compilation. All are measured in one process, and again if a run or
    a number of steps has changed.
    """
    cells = [(name, steps) for name in runs for steps in sweep.sample_steps]
    results = {name: read_json(run.workdir.results) for name, run in runs.items()}
    with parsing(f"{path}, which may be removed,"):
        done = read_json(path) if path.exists() else {"runs": {}, "draws": []}
        if done["runs"] == results and [(draw["variant"], draw["steps"]) for draw in done["draws"]] == cells:
            return
    scores = {name: drawing_score(run.config, name) for name, run in runs.items()}
    samplers = load_samplers(runs)
    drawers = {name: _drawer(run, scores[name], samplers[name]) for name, run in runs.items()}
    batches = {name: scores[name].images // run.config.eval.batch_size for name, run in runs.items()}
    images, seconds = ({cell: [] for cell in cells} for _ in range(2))
    for batch in range(-1, max(batches.values())):  # the first one compiles
        for name, steps in cells:
            if batch >= batches[name]:
                continue
            started = time.perf_counter()
            drawn = drawers[name](steps, max(batch, 0))
            if batch >= 0:
                seconds[name, steps].append((time.perf_counter() - started) / len(drawn))
                images[name, steps].append(drawn)
            if guard.signum is not None:
                raise Interrupted(guard.signum)
    draws = []
    for name, steps in cells:
        # Each batch has the same number of each prompt, in order; so must the concatenation.
        drawn, score = np.stack(images[name, steps]), scores[name]
        by_prompt = drawn.reshape(len(drawn), score.num_prompts, -1, *drawn.shape[2:])
        by_prompt = by_prompt.swapaxes(0, 1).reshape(-1, *drawn.shape[2:])
        timed = {"variant": name, "steps": steps, "seconds_per_image": float(np.median(seconds[name, steps]))}
        draws.append(timed | score.score(by_prompt))
    write_atomically(path, (json.dumps({"runs": results, "draws": draws}, indent=2) + "\n").encode())


def load_samplers(runs: dict[str, Run]) -> dict[str, ImageSampler]:
    """The samplers of a sweep's runs. In Couple they share the weights of the VLM, which is the sweep's own, so that
    variants that are compared cost the memory of their pathways, not each that of a VLM too."""
    samplers, vlms = {}, {}
    for name, run in runs.items():
        sampler = ImageSampler.of(run, run.params())
        if not run.config.model_config.shares_layers:
            sampler.vlm = vlms.setdefault(run.config.dtype, sampler.vlm)
        samplers[name] = sampler
    return samplers


def _drawer(run: Run, score: DrawingScore, sampler: ImageSampler) -> Callable[[int, int], np.ndarray]:
    """Returns a function of a number of steps and a seed that draws one batch, with the same number for each prompt."""
    config = run.config
    prompts = score.prompts(run.encoder)
    size = config.eval.batch_size

    def draw(steps: int, seed: int) -> np.ndarray:
        sampling = dataclasses.replace(config.eval.sampling, num_steps=steps)
        return sampler(prompts, sampling, images_per_prompt=size // len(prompts), batch_size=size, seed=seed)

    return draw
