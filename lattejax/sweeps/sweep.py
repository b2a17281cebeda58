"""A sweep: variants of one config, several seeds each, trained from one pretrained VLM and compared.

Its directory:

vlm/                    the run that pretrains the VLM
runs/<variant>_<seed>/  a run for each variant and seed
sampling.json           scores and times by number of sampling steps, for each variant's run with the first seed
table.csv, table.md     the comparison, see `sweeps.comparison`
*.png                   its plots
"""

import dataclasses
import json
import time
from collections.abc import Callable

import numpy as np
from etils import epath

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.data.prompts import prompt_encoder
from lattejax.errors import UserError, parsing
from lattejax.evaluation.protocol import DrawingScore
from lattejax.files import check_writable, read_json, remove_leftovers, write_atomically
from lattejax.interrupts import Interrupted
from lattejax.leases import one_writer
from lattejax.runs.checkpoints import fingerprints
from lattejax.runs.data import open_data
from lattejax.runs.run import Run, open_mesh
from lattejax.runs.workdir import Workdir
from lattejax.sampling.images import ImageSampler
from lattejax.sweeps.comparison import write_comparison
from lattejax.sweeps.definition import Sweep, drawing_score, naming
from lattejax.training.checks import (
    changes,
    check_fit,
    check_lengths,
    check_records,
    check_unseen,
    find_tokenizer,
    refuse_other_data,
)
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.layout import check_mesh
from lattejax.training.stages import pretrain, train
from lattejax.weights.autoencoders import StoredAutoencoder


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
    _check(sweep, Workdir(directory / "vlm"))
    pretrain(sweep.base, directory / "vlm", guard)
    runs = {}
    for seed in sweep.seeds:
        for name, variant in sweep.variants.items():
            workdir = Workdir(directory / "runs" / f"{name}_{seed}")
            runs[name, seed] = _train(variant, seed, directory / "vlm", workdir, guard)
    _sample(sweep, {name: runs[name, sweep.seeds[0]] for name in sweep.variants}, directory / "sampling.json", guard)
    return write_comparison(directory, runs)


def _check(sweep: Sweep, vlm: Workdir) -> None:
    """Raises `UserError` for what one of the runs would refuse, before any is trained."""
    tokenizer, checked = find_tokenizer(sweep.base, vlm, open_data(sweep.base)), set()
    is_new = not vlm.config.exists()
    has_vlm = not is_new and Run.open(vlm.path).has_vlm
    for name, variant in sweep.variants.items():
        with naming(name):
            check_mesh(variant, open_mesh(variant))
            check_records(_config_of_run(variant, 0, vlm.path), open_data(variant))
    for name, variant in sweep.variants.items():
        with naming(name):
            source, encoder = open_data(variant), prompt_encoder(variant, tokenizer)
            check_fit(variant, encoder, StoredAutoencoder.open_for(variant.data).identity, has_all_weights=has_vlm)
            if (what := (variant.data, variant.train.share_contexts)) in checked:
                continue  # the rest takes long, and depends on these alone
            checked.add(what)
            if is_new:
                check_unseen(variant, encoder, source)
            check_lengths(variant, encoder, source)


def _config_of_run(variant: Config, seed: int, vlm: epath.Path) -> Config:
    pretrained = dataclasses.replace(variant.pretrain, init_from=str(vlm), steps=0)
    return dataclasses.replace(variant, seed=seed, pretrain=pretrained)


def _train(variant: Config, seed: int, vlm: epath.Path, workdir: Workdir, guard: InterruptGuard) -> Run:
    """Trains one run, unless it has finished."""
    config = _config_of_run(variant, seed, vlm)
    print(f"---- {workdir.path.name}", flush=True)
    if workdir.config.exists():
        theirs = configuration.load(workdir.config)
        # The sweep's directory may have moved since the run was started.
        moved = dataclasses.replace(theirs, pretrain=dataclasses.replace(theirs.pretrain, init_from=str(vlm)))
        is_same = not changes(config, moved)
        if is_same:
            _refuse_another_start(config, workdir, vlm)
        if is_same and workdir.results.exists():
            return Run.open(workdir.path)
        if is_same and moved != theirs:
            with workdir.writing():
                configuration.save(moved, workdir.config)
    train(config, workdir.path, guard)
    return Run.open(workdir.path)


def _refuse_another_start(config: Config, workdir: Workdir, vlm: epath.Path) -> None:
    """Raises `UserError` if a run has been trained on other data, or from another VLM than the sweep's is now."""
    refuse_other_data(config, workdir, open_data(config), StoredAutoencoder.open_for(config.data).identity)
    run = Run.open(workdir.path)
    if run.has_vlm and not has_same_vlm(run, Run.open(vlm)):
        raise UserError(f"{workdir.path} was trained from another VLM than {vlm}; remove it, to train it again")


def has_same_vlm(run: Run, other: Run) -> bool:
    """Whether two runs have the same VLM at the end of their first stage, bit for bit."""
    references = [each.workdir.vlm_reference for each in (run, other)]
    if all(reference.exists() for reference in references):
        return len({reference.read_text() for reference in references}) == 1
    ours, theirs = (fingerprints({"vlm": each.pretrained_vlm()}) for each in (run, other))
    return ours == theirs


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
