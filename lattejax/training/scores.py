"""The scores at the end of a run, and scores on demand."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lattejax.data.examples import Source, image_batcher
from lattejax.errors import UserError
from lattejax.evaluation.held_out import HeldOutFlowLoss, HeldOutLoss
from lattejax.evaluation.protocol import Report, Subject
from lattejax.evaluation.registry import due, open_evaluator, open_evaluators, same_figures, take_scores
from lattejax.files import write_with
from lattejax.models import functional, latte_flow
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.functional import Params
from lattejax.parallel import hosts
from lattejax.runs.checkpoints import fingerprints
from lattejax.runs.data import open_data
from lattejax.runs.inference import inference_weights
from lattejax.runs.records import read_records
from lattejax.runs.run import Run
from lattejax.training.generation_stage import flow_loss, frozen_inputs


def final_scores(run: Run) -> dict[str, Any]:
    """Returns the final held-out loss, if training took any, and the scores at the end of a run; writes their pictures.

    The loss is the last evaluation's. If that was before the last step, because `every` left it out, it is measured.
    """
    config, source = run.config, open_data(run.config)
    evaluated = [record for record in read_records(run.workdir.metrics) if "held_out_loss" in record]
    is_final = bool(evaluated) and evaluated[-1]["step"] == config.train.steps

    def losses() -> Float[np.ndarray, "K"]:
        return np.asarray(evaluated[-1]["held_out_loss_per_group"]) if is_final else measure_losses(run, source)

    subject = _subject(run, source, losses)
    report = take_scores(due(open_evaluators(config, source), "end"), subject)
    if hosts.is_first():
        for name, picture in report.pictures.items():
            path = run.workdir.image(name, "end", config.train.steps)
            write_with(path, lambda file, picture=picture: picture.save(file, format="PNG"))
    figures = as_json(report.figures)
    if not evaluated:
        return figures
    final = evaluated[-1] if is_final else as_json(HeldOutFlowLoss.open(config, source)(subject).figures)
    return {"held_out_loss": final["held_out_loss"]} | figures


def scores_on_demand(run: Run, names: Sequence[str]) -> Report:
    """Takes scores of a run, or of an export.

    Args:
      run: opened on the mesh that computes them.
      names: names in config.eval.evaluators, or in the registry, for a score with its default settings; empty: all that
        the config lists for the end of a run or on demand.

    Raises:
      UserError: one is unknown, or does not fit the config or the data; or two would return figures of the same names.
    """
    run = run.pinned()
    source, listed = open_data(run.config), run.config.eval.evaluators
    if names:
        taken = [open_evaluator(name, listed.get(name, {}), run.config, source) for name in names]
    else:
        every = open_evaluators(run.config, source)
        taken = [one for one in every if one.is_due("end", 0) or one.is_due("demand", 0)]
    if not taken:
        raise UserError(f"the config of {run.workdir.path} has no scores for the end or on demand; name some")
    if twice := same_figures(taken, at_once=True):
        raise UserError(f"{twice[0]} and {twice[1]} would return figures of the same names; take one at a time")
    return take_scores([one.evaluator for one in taken], _subject(run, source, lambda: measure_losses(run, source)))


def settings_on_demand(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """What determines the figures of `scores_on_demand`; all processes must call it."""
    run = run.pinned()
    config, listed = run.config, run.config.eval.evaluators
    moments = ("end", "demand")
    names = names or [name for at in moments for name, each in listed.items() if each.get("at") == at]
    return {
        "weights": fingerprints({"weights": run.params(config.dtype)})["weights"],
        "trained_steps": None if run.is_export else run.trained_step,
        "dtype": config.dtype,
        "data": open_data(config).identities[0],
        "scores": {name: listed.get(name, {}) for name in names},
        "seed": config.seed,
        "examples": config.eval.examples,
        "batch_size": config.eval.batch_size,
        "sampling": dataclasses.asdict(config.eval.sampling),
    }


def measure_losses(run: Run, source: Source) -> Float[np.ndarray, "K"]:
    """Each group's loss on held-out drawings, with the weights that the run samples with."""
    config = run.config
    trained, fixed = latte_flow.split_trained(config.model_config, run.params())
    fixed = functional.cast_floats(fixed, config.dtype)
    frozen = frozen_inputs(config, run.encoder, source.captions, fixed, run.mesh)
    make_batch = image_batcher(config, run.encoder, source.captions)
    held_out = HeldOutLoss(config, flow_loss(config), source.drawings("test", run.encoder), make_batch, run.mesh)
    return held_out(trained, frozen)


def as_json(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in figures.items()}


def _subject(run: Run, source: Source, losses: Callable[[], Float[np.ndarray, "K"]]) -> Subject:
    def weights() -> Params:
        return inference_weights(run.config, run.params(), run.mesh)

    def decoder() -> tuple[Autoencoder, Params]:
        stored = run.open_autoencoder()
        return stored.autoencoder, stored.weights("decoder")

    penalty = run.generation.repetition_penalty
    return Subject(run.config, source, run.encoder, run.mesh, weights, losses, decoder, penalty)
