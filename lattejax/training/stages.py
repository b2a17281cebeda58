"""The two stages of a run, one after the other: the VLM learns to read, then the generation pathway learns to draw."""

import dataclasses
import json

import jax
from absl import logging
from etils import epath
from tqdm import tqdm

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.data import tokenizer as tokenizers
from lattejax.data.examples import Source, encode_prompts, open_source
from lattejax.data.pipeline import chunks, every
from lattejax.data.prompts import PromptEncoder
from lattejax.errors import UserError
from lattejax.evaluation.digits import DigitReader, frechet_train_test
from lattejax.files import read_json, write_whole
from lattejax.parallel import hosts
from lattejax.sampling.images import ImageSampler
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.loop import run_stage
from lattejax.training.metrics import RunClock, read_records
from lattejax.training.plans import (
    caption_prompts,
    check_mesh,
    draw_digits,
    first_vlm,
    generation_plan,
    held_out_answers,
    pretrain_plan,
)
from lattejax.weights import checkpoints, shards
from lattejax.weights.autoencoders import Identity, StoredAutoencoder
from lattejax.weights.pretrained import Pretrained
from lattejax.weights.runs import Run, Workdir, abstract_trained, open_mesh, open_vlm, prompt_encoder


def train(config: Config, path: str | epath.Path, guard: InterruptGuard) -> dict[str, float]:
    """Trains both stages and scores the result; goes on where an interrupted run with the same config was.

    Returns the final scores, which are also in the workdir's `results.json`.

    Raises:
      UserError: the workdir belongs to another config, or the tokenizer does not fit the model.
      Interrupted: a signal came; everything is saved.
    """
    run, clock = open_workdir(config, path)
    _, train_key = jax.random.split(jax.random.key(config.seed))
    train_vlm(run, clock, guard)
    run_stage(generation_plan(run, train_key), config, run.workdir, clock, guard)

    results = final_scores(run)
    results["seconds"] = clock.seconds
    if hosts.is_first():
        write_whole(run.workdir.results, (json.dumps(results, indent=2) + "\n").encode())
    hosts.wait_for_all("results are written")
    return results


def pretrain(config: Config, path: str | epath.Path, guard: InterruptGuard) -> None:
    """Trains the first stage alone; other runs can start from its workdir. Raises as `train` does."""
    run, clock = open_workdir(config, path)
    train_vlm(run, clock, guard)


def train_vlm(run: Run, clock: RunClock, guard: InterruptGuard) -> None:
    """Runs the first stage, unless it has finished. Of no steps, it takes the weights to start from as they are."""
    workdir, config = run.workdir, run.config
    key, _ = jax.random.split(jax.random.key(config.seed))
    if not run.has_vlm:
        if config.pretrain.steps:
            plan = pretrain_plan(run, key)
            checkpoints.save_weights(workdir.vlm, run_stage(plan, config, workdir, clock, guard).average)
        elif (converted := converted_vlm(config)) is not None:
            if hosts.is_first():
                run.refer_to(converted)
        else:
            checkpoints.save_weights(workdir.vlm, first_vlm(config, jax.random.split(key)[0], run.mesh))
    hosts.wait_for_all("the VLM is stored")
    if hosts.is_first() and workdir.checkpoints("pretrain").exists():
        workdir.checkpoints("pretrain").rmtree()  # from here on the VLM is stored once


def converted_vlm(config: Config) -> Pretrained | None:
    """The converted weights that the config starts from, itself or through a run that has left them as they are."""
    source = open_vlm(config.pretrain.init_from) if config.pretrain.init_from else None
    if not isinstance(source, Run):
        return source
    return None if source.config.model_config.shares_layers else source.converted_vlm()


# ---- Before any work starts


def open_workdir(config: Config, path: str | epath.Path) -> tuple[Run, RunClock]:
    """Checks that everything fits, and makes the workdir a run's, or finds that it is this run's."""
    workdir, mesh = Workdir.at(path), open_mesh(config)
    refuse_another_config(config, workdir)
    check_mesh(config, mesh)
    source = open_source(config)
    encoder = prompt_encoder(config, find_tokenizer(config, workdir, source))
    autoencoder = StoredAutoencoder.open_for(config.data).identity
    check_fit(config, encoder, autoencoder)
    is_new = not workdir.config.exists()
    if is_new:
        check_lengths(config, encoder, source)
    else:
        refuse_other_data(config, workdir, source, autoencoder)
    hosts.wait_for_all("the workdir is looked at")
    if is_new and hosts.is_first():
        tokenizers.save(encoder.tokenizer, workdir.tokenizer)
        autoencoder.save(workdir.autoencoder)
        write_whole(workdir.data, (json.dumps({"identity": source.identities[0]}) + "\n").encode())
        configuration.save(config, workdir.config)
    hosts.wait_for_all("the workdir is a run's")
    return dataclasses.replace(Run.open(workdir.path, mesh), config=config), RunClock(workdir)


def refuse_other_data(config: Config, workdir: Workdir, source: Source, autoencoder: Identity) -> None:
    """Raises `UserError` if what stands where the config says is not what the run has been trained on so far."""
    Identity.load(workdir.autoencoder).check(autoencoder, f"the run {workdir.path}", config.data.autoencoder)
    if read_json(workdir.data).get("identity") not in source.identities:
        raise UserError(f"{config.data.latents} holds other latents than those that {workdir.path} was trained on")


def refuse_another_config(config: Config, workdir: Workdir) -> None:
    """Raises `UserError` if the workdir belongs to another config, and shows the difference, or is an export."""
    if shards.are_stored(workdir.path):
        raise UserError(f"{workdir.path} holds exported weights; use another --workdir, and set init_from to this one")
    if workdir.config.exists():
        theirs = configuration.load(workdir.config)
        # Another mesh computes the same, and what pictures were made into latents is told by the latents.
        free = {name: getattr(theirs, name) for name in ("images", "mesh", "most_skipped_steps")}
        different = configuration.differences(dataclasses.replace(config, **free), theirs)
        if different:
            raise UserError(
                f"{workdir.path} belongs to another config ({'; '.join(different)}); use another --workdir, "
                "or set init_from to start from its weights"
            )


def find_tokenizer(config: Config, workdir: Workdir, source: Source) -> tokenizers.Tokenizer:
    """Returns the run's tokenizer: the saved one, else that of the run to start from, else the one that the config
    names, else one trained on the data's texts."""
    if tokenizers.is_saved(workdir.tokenizer):
        return tokenizers.load(workdir.tokenizer)
    if config.pretrain.init_from:
        return open_vlm(config.pretrain.init_from).encoder.tokenizer
    if config.tokenizer.path:
        return tokenizers.load(epath.Path(config.tokenizer.path))
    return tokenizers.train(source.texts(), config.tokenizer.vocab_size)


def check_fit(config: Config, encoder: PromptEncoder, autoencoder: Identity) -> None:
    """Raises `UserError` if tokenizer or the weights to start from do not fit the config."""
    entries, room = len(encoder.tokenizer), config.model.text.vocab_size
    if entries > room:
        raise UserError(f"the tokenizer has {entries} entries, more than config.model.text.vocab_size={room}")
    if config.pretrain.init_from:
        check_same_vlm(config, encoder, open_vlm(config.pretrain.init_from))
    if config.train.init_from:
        theirs, name = Run.open(config.train.init_from), f"the weights of {config.train.init_from}"
        checkpoints.check_shapes(abstract_trained(theirs.config), abstract_trained(config), name)
        Identity.load(theirs.workdir.autoencoder).check(autoencoder, theirs.workdir.path, config.data.autoencoder)
        warn_of_another_pathway(config, theirs.config)


def warn_of_another_pathway(config: Config, theirs: Config) -> None:
    """Says where weights to start from were trained as another function than the config's, which shapes do not show."""
    ours, before = (dataclasses.asdict(either.model_config.generation) for either in (config, theirs))
    different = [f"{key}: {before[key]!r} -> {ours[key]!r}" for key in ours if ours[key] != before[key]]
    if different:
        logging.warning("the weights of %s were trained with %s", config.train.init_from, "; ".join(different))


def check_lengths(config: Config, encoder: PromptEncoder, source: Source) -> None:
    """Raises `UserError` if contexts cannot be shared, or a prompt of the data set is longer than the config allows."""
    if config.train.share_contexts and not source.captions:
        raise UserError(
            f"{config.data.latents} has more captions than can be read ahead; set config.train.share_contexts=False"
        )
    caption_prompts(config, encoder, source.captions)
    for split in ("train", "test"):
        drawings, questions = source.drawings(split, encoder), source.questions(split, encoder)
        if not (source.captions and config.data.prompts == "captions"):
            with tqdm(desc=f"checking {split} prompts", total=len(drawings), unit="prompt", disable=None) as bar:
                for chunk in chunks(drawings):
                    encoder.check_length(encode_prompts(encoder, chunk), config.data.prompt_length)
                    bar.update(len(chunk))
        if questions is not None:
            encoder.check_length(every(questions), config.data.answer_length)


def check_same_vlm(config: Config, encoder: PromptEncoder, source: Run | Pretrained) -> None:
    """Raises `UserError` unless the VLM to start from is the config's, and sees images as the config has it."""
    ours, theirs = (dataclasses.asdict(vlm) for vlm in (config.model_config.vlm, source.vlm_config))
    different = [
        f"config.model.{tower}.{key} is {ours[tower][key]!r}, theirs {theirs[tower][key]!r}"
        for tower in ours
        for key in ours[tower]
        if ours[tower][key] != theirs[tower][key]
    ]
    for key in ("image_mean", "image_std", "rescale_factor", "resample"):
        ours_too, theirs_too = (getattr(either.processor, key) for either in (encoder, source.encoder))
        if ours_too != theirs_too:
            different.append(f"the image processor's {key} is {ours_too!r}, theirs {theirs_too!r}")
    if different:
        raise UserError(f"the weights of {config.pretrain.init_from} do not fit the config: {'; '.join(different)}")


# ---- The end


def final_scores(run: Run) -> dict[str, float]:
    """The last held-out loss; of the digits also the share of right answers, and scores of digits drawn at guidance 1
    and 2, see `evaluation.digits`."""
    config = run.config
    losses = [record["held_out_loss"] for record in read_records(run.workdir.metrics) if "held_out_loss" in record]
    scores = {"held_out_loss": losses[-1]} if losses else {}
    if config.data.source != "digits":
        return scores
    params, reader = run.params(), DigitReader()
    scores["answer_accuracy"] = held_out_answers(run, params["vlm"], examples=0)
    if config.eval.final_images:
        sampler = ImageSampler.of(run, params)
        for guidance in (1, 2):
            sampling = dataclasses.replace(config.eval.sampling, guidance=float(guidance))
            images = draw_digits(config, sampler, config.eval.final_images, sampling)
            for name, score in reader.score(images).items():
                scores[f"{name}_guidance_{guidance}"] = score
    return scores | {"frechet_train_test": frechet_train_test()}
