"""The two stages of a run, one after the other: the VLM learns to read, then the generation pathway learns to draw."""

import dataclasses
import json

import jax
from etils import epath

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.data import digits
from lattejax.data import tokenizer as tokenizers
from lattejax.data.prompts import PromptEncoder
from lattejax.errors import UserError
from lattejax.evaluation.digits import DigitReader, answer_accuracy, frechet_train_test
from lattejax.files import write_whole
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.loop import run_stage
from lattejax.training.metrics import RunClock
from lattejax.training.plans import caption_prompts, draw_digits, drawings, generation_plan, pretrain_plan
from lattejax.weights import checkpoints, shards
from lattejax.weights.pretrained import Pretrained
from lattejax.weights.runs import Run, Workdir, abstract_trained, inference_weights, open_vlm, prompt_encoder


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
    write_whole(run.workdir.results, (json.dumps(results, indent=2) + "\n").encode())
    return results


def pretrain(config: Config, path: str | epath.Path, guard: InterruptGuard) -> None:
    """Trains the first stage alone; other runs can start from its workdir. Raises as `train` does."""
    run, clock = open_workdir(config, path)
    train_vlm(run, clock, guard)


def train_vlm(run: Run, clock: RunClock, guard: InterruptGuard) -> None:
    """Runs the first stage, unless it has finished."""
    workdir, config = run.workdir, run.config
    if not checkpoints.is_complete(workdir.vlm):
        key, _ = jax.random.split(jax.random.key(config.seed))
        plan = pretrain_plan(config, run.encoder, key)
        weights = run_stage(plan, config, workdir, clock, guard).ema if config.pretrain.steps else plan.init()
        checkpoints.save_weights(workdir.vlm, weights)
    if workdir.checkpoints("pretrain").exists():
        workdir.checkpoints("pretrain").rmtree()  # from here on the VLM is stored once


# ---- Before any work starts


def open_workdir(config: Config, path: str | epath.Path) -> tuple[Run, RunClock]:
    """Checks that everything fits, and makes the workdir a run's, or finds that it is this run's."""
    workdir = Workdir.at(path)
    refuse_another_config(config, workdir)
    encoder = prompt_encoder(config, find_tokenizer(config, workdir))
    check_fit(config, encoder)
    if not workdir.config.exists():
        tokenizers.save(encoder.tokenizer, workdir.tokenizer)
        configuration.save(config, workdir.config)
    return Run.open(workdir.path), RunClock(workdir)


def refuse_another_config(config: Config, workdir: Workdir) -> None:
    """Raises `UserError` if the workdir belongs to another config, and shows the difference, or is an export."""
    if shards.are_stored(workdir.path):
        raise UserError(f"{workdir.path} holds exported weights; use another --workdir, and set init_from to this one")
    if workdir.config.exists():
        different = configuration.differences(config, configuration.load(workdir.config))
        if different:
            raise UserError(
                f"{workdir.path} belongs to another config ({'; '.join(different)}); use another --workdir, "
                "or set init_from to start from its weights"
            )


def find_tokenizer(config: Config, workdir: Workdir) -> tokenizers.Tokenizer:
    """Returns the run's tokenizer: the saved one, else that of the run to start from, else the one that the config
    names, else one trained on the data's texts."""
    if tokenizers.is_saved(workdir.tokenizer):
        return tokenizers.load(workdir.tokenizer)
    if config.pretrain.init_from:
        return open_vlm(config.pretrain.init_from).encoder.tokenizer
    if config.tokenizer.path:
        return tokenizers.load(epath.Path(config.tokenizer.path))
    return tokenizers.train(digits.texts(), config.tokenizer.vocab_size)


def check_fit(config: Config, encoder: PromptEncoder) -> None:
    """Raises `UserError` if tokenizer, prompts or the weights to start from do not fit the config."""
    entries, room = len(encoder.tokenizer), config.model.text.vocab_size
    if entries > room:
        raise UserError(f"the tokenizer has {entries} entries, more than config.model.text.vocab_size={room}")
    caption_prompts(config, encoder)
    encoder.check_length(drawings(config, encoder, "train").prompts, config.data.prompt_length)
    questions = digits.Questions("train", encoder)
    encoder.check_length((questions[i] for i in range(len(questions))), config.data.answer_length)
    if config.pretrain.init_from:
        check_same_vlm(config, encoder, open_vlm(config.pretrain.init_from))
    if config.train.init_from:
        theirs = abstract_trained(Run.open(config.train.init_from).config)
        checkpoints.check_shapes(theirs, abstract_trained(config), f"the weights of {config.train.init_from}")


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
    """Scores answers, and digits drawn at guidance 1 and 2; see `evaluation.digits`."""
    config, encoder = run.config, run.encoder
    weights, vlm = inference_weights(config, run.params()), config.model_config.vlm
    accuracy = answer_accuracy(vlm, weights["vlm"], encoder, examples=0, batch_size=config.eval.batch_size)
    scores, reader = {"answer_accuracy": accuracy}, DigitReader()
    for guidance in (1, 2):
        sampling = dataclasses.replace(config.eval.sampling, guidance=float(guidance))
        images = draw_digits(config, encoder, weights, config.eval.final_images, sampling)
        for name, score in reader.score(images).items():
            scores[f"{name}_guidance_{guidance}"] = score
    return scores | {"frechet_train_test": frechet_train_test()}
