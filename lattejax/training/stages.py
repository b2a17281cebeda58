"""The two stages of a run, one after the other: the VLM learns to read, then the generation pathway learns to draw."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.data import tokenizer as tokenizers
from lattejax.data.prompts import prompt_encoder
from lattejax.evaluation.registry import open_evaluators
from lattejax.files import write_atomically
from lattejax.parallel import hosts
from lattejax.runs.data import open_data
from lattejax.runs.run import Run, open_mesh, open_vlm
from lattejax.runs.workdir import Workdir
from lattejax.training.checks import (
    check_fit,
    check_lengths,
    check_records,
    check_unseen,
    find_tokenizer,
    refuse_another_config,
    refuse_other_data,
    warn_of_settings,
)
from lattejax.training.generation_stage import generation_recipe
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.layout import check_mesh
from lattejax.training.loop import run_stage
from lattejax.training.metrics import RunClock
from lattejax.training.scores import final_scores
from lattejax.training.vlm_stage import first_vlm, vlm_recipe
from lattejax.weights import trees
from lattejax.weights.autoencoders import StoredAutoencoder
from lattejax.weights.pretrained import GENERATION, Pretrained


def train(config: Config, path: epath.PathLike, guard: InterruptGuard) -> dict[str, Any]:
    """Trains both stages and scores the result; resumes an interrupted run with the same config.

    Returns the final scores, which are also in the workdir's `results.json`.

    Raises:
      UserError: the workdir belongs to another config, or the tokenizer does not fit the model.
      Interrupted: on a signal; everything is saved.
    """
    with own_workdir(config, path) as (run, clock):
        _, train_key = jax.random.split(jax.random.key(config.seed))
        train_vlm(run, clock, guard)
        run_stage(generation_recipe(run, train_key), config, run.workdir, clock, guard)
        hosts.wait_for_all("the metrics are written")
        results = final_scores(run)
        results["seconds"] = clock.seconds
        if hosts.is_first():
            write_atomically(run.workdir.results, (json.dumps(results, indent=2) + "\n").encode())
        hosts.wait_for_all("results are written")
        return results


def pretrain(config: Config, path: epath.PathLike, guard: InterruptGuard) -> None:
    """Trains the first stage only; other runs can start from its workdir. Raises as `train` does."""
    with own_workdir(config, path, vlm_alone=True) as (run, clock):
        train_vlm(run, clock, guard)


def train_vlm(run: Run, clock: RunClock, guard: InterruptGuard) -> None:
    """Runs the first stage, unless it has finished. With no steps, it takes the weights to start from unchanged."""
    workdir, config = run.workdir, run.config
    key, _ = jax.random.split(jax.random.key(config.seed))
    if not run.has_vlm:
        if config.pretrain.steps:
            recipe = vlm_recipe(run, key)
            trees.save_weights(workdir.vlm, run_stage(recipe, config, workdir, clock, guard).average)
        elif (converted := converted_vlm(config)) is not None:
            if hosts.is_first():
                run.refer_to(converted)
        else:
            trees.save_weights(workdir.vlm, first_vlm(config, jax.random.split(key)[0], run.mesh))
    hosts.wait_for_all("the VLM is stored")
    if hosts.is_first() and workdir.checkpoints("pretrain").exists():
        workdir.checkpoints("pretrain").rmtree()  # from here on the VLM is stored once


def converted_vlm(config: Config) -> Pretrained | None:
    """The converted weights that the config starts from, directly or through a run that has not changed them."""
    source = open_vlm(config.pretrain.init_from) if config.pretrain.init_from else None
    if not isinstance(source, Run):
        return source
    has_changed_them = source.config.model_config.shares_layers and source.trained_step is not None
    return None if has_changed_them else source.converted_vlm()


# ---- Before any work starts


@contextlib.contextmanager
def own_workdir(config: Config, path: epath.PathLike, *, vlm_alone: bool = False) -> Iterator[tuple[Run, RunClock]]:
    """Opens a run that this job alone writes, until the block ends; see `open_workdir`."""
    with Workdir.at(path).writing() if hosts.is_first() else contextlib.nullcontext():
        hosts.wait_for_all("the workdir is held")  # leftovers are removed, and nobody else writes
        yield open_workdir(config, path, vlm_alone=vlm_alone)


def open_workdir(config: Config, path: epath.PathLike, *, vlm_alone: bool = False) -> tuple[Run, RunClock]:
    """Checks that everything fits, and initializes the workdir or confirms that it belongs to this run, of which only
    the first stage may be wanted."""
    workdir, mesh = Workdir.at(path), open_mesh(config)
    refuse_another_config(config, workdir)
    check_mesh(config, mesh)
    source = open_data(config)
    check_records(config, source)
    open_evaluators(config, source)
    encoder = prompt_encoder(config, find_tokenizer(config, workdir, source))
    autoencoder = StoredAutoencoder.open_for(config.data).identity
    is_new = not workdir.config.exists()
    before = None if is_new else Run.open(workdir.path)
    complete = before is not None and (before.has_vlm if vlm_alone else before.has_all_weights)
    check_fit(config, encoder, autoencoder, has_all_weights=complete)
    if is_new:
        check_unseen(config, encoder, source)
        check_lengths(config, encoder, source)
    else:
        refuse_other_data(config, workdir, source, autoencoder)
    if hosts.is_first():
        warn_of_settings(config)
    hosts.wait_for_all("the workdir is checked")
    if is_new and hosts.is_first():
        tokenizers.save(encoder.tokenizer, workdir.tokenizer)
        _copy_decoding(config, workdir)
        autoencoder.save(workdir.autoencoder)
        write_atomically(workdir.data, (json.dumps({"identity": source.identities[0]}) + "\n").encode())
        configuration.save(config, workdir.config)
    hosts.wait_for_all("the workdir is initialized")
    return dataclasses.replace(Run.open(workdir.path, mesh), config=config), RunClock(workdir)


def _copy_decoding(config: Config, workdir: Workdir) -> None:
    """Copies how the VLM that the run starts from decodes. What another start has left is removed."""
    source = open_vlm(config.pretrain.init_from).generation_file if config.pretrain.init_from else None
    if source is not None and source.exists():
        write_atomically(workdir.path / GENERATION, source.read_bytes())
    else:
        (workdir.path / GENERATION).unlink(missing_ok=True)
