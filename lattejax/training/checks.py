"""Checks before any work starts: that config, data, weights and workdir fit together."""

import dataclasses
import functools
from typing import Any

from absl import logging
from tqdm import tqdm

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.data import tokenizer as tokenizers
from lattejax.data.examples import Source, seen_drawings
from lattejax.data.identity import Identity
from lattejax.data.prompts import PromptEncoder
from lattejax.errors import UserError
from lattejax.files import read_json, resolve_path
from lattejax.models.generation_layer import RESIDUAL_ATTENTION
from lattejax.runs.run import Run, open_vlm
from lattejax.runs.shapes import abstract_trained
from lattejax.runs.workdir import Workdir
from lattejax.training.generation_stage import caption_prompts
from lattejax.weights import shards, trees
from lattejax.weights.pretrained import Pretrained

MOST_INITIAL = 0.25  # of the initial weights in the final average, without a warning
IGNORED = (  # a key that has an effect only if another has one of these values
    ("train.density_mean", "train.density", ("logit_normal",)),
    ("train.density_std", "train.density", ("logit_normal",)),
    ("train.density_shift", "train.density", ("shifted",)),
    ("model.residual_gate", "model.residual_attention", tuple(kind for kind in RESIDUAL_ATTENTION if kind != "none")),
)


def refuse_other_data(config: Config, workdir: Workdir, source: Source, autoencoder: Identity) -> None:
    """Raises `UserError` if the config's data or autoencoder are not those that the run has been trained on so far."""
    Identity.load(workdir.autoencoder).check(autoencoder, f"the run {workdir.path}", config.data.autoencoder)
    if read_json(workdir.data).get("identity") not in source.identities:
        raise UserError(f"{config.data.latents} holds other latents than those {workdir.path} was trained on")


def refuse_another_config(config: Config, workdir: Workdir) -> None:
    """Raises `UserError` if the workdir belongs to another config, and shows the difference, or is an export."""
    if shards.are_stored(workdir.path):
        raise UserError(f"{workdir.path} holds exported weights; use another --workdir, and set init_from to this one")
    if not workdir.config.exists():
        places = workdir.vlm, workdir.vlm_reference, workdir.path / "checkpoints"
        if weights := [path for path in places if path.exists()]:
            raise UserError(f"{workdir.path} has no config.json, but {weights[0].name}; use another --workdir")
    elif different := changes(config, configuration.load(workdir.config)):
        raise UserError(
            f"{workdir.path} belongs to another config ({'; '.join(different)}); use another --workdir, "
            "or set init_from to start from its weights"
        )


def changes(config: Config, theirs: Config) -> list[str]:
    """Lists the keys, as `key: theirs -> ours`, with which a run of `theirs` must not resume."""
    # Another mesh computes the same results, and the latents' identity covers the pictures they were made from.
    free = ("images.", "mesh.", "most_skipped_steps:", "profile.")
    return [line for line in configuration.differences(config, theirs) if not line.startswith(free)]


def find_tokenizer(config: Config, workdir: Workdir, source: Source) -> tokenizers.Tokenizer:
    """Returns the run's tokenizer: the saved one if the run exists, otherwise that of the run to start from, otherwise
    the config's, otherwise one trained on the data's texts."""
    if workdir.config.exists():  # what a start left that was killed before is of any config
        return tokenizers.load(workdir.tokenizer)
    if config.pretrain.init_from:
        return open_vlm(config.pretrain.init_from).encoder.tokenizer
    if config.tokenizer.path:
        return tokenizers.load(resolve_path(config.tokenizer.path))
    return tokenizers.train(source.texts(), config.tokenizer.vocab_size)


def check_fit(config: Config, encoder: PromptEncoder, autoencoder: Identity, *, has_all_weights: bool = False) -> None:
    """Checks that the tokenizer and the weights to start from fit the config.

    Args:
      config: the run's config.
      encoder: the prompt encoder, with the run's tokenizer.
      autoencoder: that of the run's latents.
      has_all_weights: whether the run no longer needs the weights to start from, which may be gone.

    Raises:
      UserError: the tokenizer has too many entries; the VLM of `pretrain.init_from` has another geometry or
        preprocessing, or is not trained yet; or the pathway of `train.init_from` has other shapes, or draws latents of
        another autoencoder, or has no checkpoint.
    """
    entries, room = len(encoder.tokenizer), config.model.text.vocab_size
    if entries > room:
        raise UserError(f"the tokenizer has {entries} entries, more than config.model.text.vocab_size={room}")
    if has_all_weights:
        return
    if config.pretrain.init_from:
        source = open_vlm(config.pretrain.init_from)
        check_same_vlm(config, encoder, source)
        if isinstance(source, Run):
            source.check_vlm()
    if config.train.init_from:
        theirs, name = Run.open(config.train.init_from), f"the weights of {config.train.init_from}"
        trees.check_shapes(abstract_trained(theirs.config), abstract_trained(config), name)
        Identity.load(theirs.workdir.autoencoder).check(autoencoder, theirs.workdir.path, config.data.autoencoder)
        theirs.check_pathway()
        warn_of_another_pathway(config, theirs.config)


def warn_of_another_pathway(config: Config, theirs: Config) -> None:
    """Warns if the weights to start from were trained with another pathway config, which shapes alone do not show."""
    ours, before = (dataclasses.asdict(either.model_config.generation) for either in (config, theirs))
    different = [f"{key}: {before[key]!r} -> {ours[key]!r}" for key in ours if ours[key] != before[key]]
    if different:
        logging.warning("the weights of %s were trained with %s", config.train.init_from, "; ".join(different))


def warn_of_settings(config: Config) -> None:
    """Warns of settings that are valid, but that together do not do what each is for; a line for each stage."""
    for name in ("pretrain", "train"):
        stage, found = getattr(config, name), []
        initial = stage.ema_decay**stage.steps
        if stage.steps and initial > MOST_INITIAL:
            found.append(
                f"{name}.ema_decay={stage.ema_decay:g} leaves {initial:.0%} of the initial weights in the average, "
                "which is what is scored and sampled"
            )
        if stage.steps and stage.warmup_steps > stage.steps:
            found.append(f"{name}.warmup_steps={stage.warmup_steps} never lets the learning rate reach its value")
        if found:
            keys = f"{name}.ema_decay and {name}.warmup_steps"
            logging.warning("in %s steps, %s; lower %s", f"{stage.steps:,}", "; ".join(found), keys)
    for key, needed, values in IGNORED:
        if config.train.steps and _at(config, key) != _at(Config(), key) and _at(config, needed) not in values:
            found = f"{key}={_at(config, key)!r}", f"{needed}={_at(config, needed)!r}"
            logging.warning("%s has no effect with %s; it needs %s", *found, " or ".join(map(repr, values)))
    if config.train.steps and not config.train.prompt_dropout and config.eval.guidance != 1:
        logging.warning(
            "train.prompt_dropout=0 never trains the empty prompt, which eval.guidance=%g guides away from; set "
            "eval.guidance=1, or a train.prompt_dropout such as 0.1",
            config.eval.guidance,
        )


def _at(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def check_records(config: Config, source: Source) -> None:
    """Raises `UserError` if the config trains on drawings or on questions but the data has none."""
    asked = {"pretrain.steps": bool(config.pretrain.steps), "model.variant='blend'": config.trains_answers}
    if wanted := [key for key, is_asked in asked.items() if is_asked and not source.has_questions]:
        raise UserError(
            f"{' and '.join(wanted)} would train on questions, and config.data.source={config.data.source!r} has none"
        )
    if config.train.steps and not source.has_drawings:
        raise UserError(
            f"config.train.steps={config.train.steps} would train on drawings, and {config.data.latents} has none; set "
            "train.steps=0 to train the VLM alone"
        )


def check_unseen(config: Config, encoder: PromptEncoder, source: Source) -> None:
    """Raises `UserError` if `data.unseen` leaves out all captioned pictures, or none."""
    if not config.data.unseen or not config.train.steps:
        return
    drawings = source.drawings("train", encoder)
    if len(seen_drawings(config, drawings)) == len(drawings):
        raise UserError(
            f"config.data.unseen={config.data.unseen!r} matches no caption of {len(drawings):,} captioned pictures: "
            "nothing is left out; correct it, or leave it empty"
        )


def check_lengths(config: Config, encoder: PromptEncoder, source: Source) -> None:
    """Raises `UserError` if contexts cannot be shared, or a prompt of the data set is longer than the config allows."""
    if config.train.share_contexts and source.has_drawings and not source.captions:
        raise UserError(
            f"{config.data.latents} has too many captions, or prompts with images: contexts cannot be shared; set "
            "config.train.share_contexts=False"
        )
    caption_prompts(config, encoder, source.captions)
    for split in ("train", "test"):
        drawings, questions = source.drawings(split, encoder), source.questions(split, encoder)
        if not (source.captions and config.data.prompts == "captions"):
            prompts = tqdm(drawings.without_pixels(), desc=f"checking {split} prompts", unit="prompt", disable=None)
            encoder.check_length(prompts, config.data.prompt_length)
        if questions is not None:
            prompts = tqdm(questions.without_pixels(), desc=f"checking {split} questions", unit="prompt", disable=None)
            encoder.check_length(prompts, config.data.answer_length)


def check_same_vlm(config: Config, encoder: PromptEncoder, source: Run | Pretrained) -> None:
    """Raises `UserError` unless the VLM to start from has the config's geometry and image preprocessing."""
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
