"""What a sweep's config defines, checked before anything is trained."""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.errors import UserError, parsing
from lattejax.evaluation.protocol import DrawingScore
from lattejax.evaluation.registry import drawing_scores, open_evaluators
from lattejax.flow.schedule import NumSteps
from lattejax.ranges import Seed, range_of
from lattejax.runs.data import open_data
from lattejax.runs.geometry import resolve_config
from lattejax.runs.workdir import Workdir

KEYS = ("base", "variants", "seeds", "sample_steps")
VLM_KEYS = ("model.text.", "model.vision.")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A resolved sweep config: for each variant its name and its config, with seed and VLM not set yet."""

    base: Config
    variants: dict[str, Config]
    seeds: tuple[int, ...]
    sample_steps: tuple[int, ...]


def resolve_sweep(config: ConfigDict, path: epath.PathLike | None = None) -> Sweep:
    """Checks a complete sweep config, before anything is trained; raises `UserError`.

    Args:
      config: what a sweep's config file returns.
      path: the sweep's directory, if it may resume: once it has a VLM, it needs no run that this one started from.
    """
    vlm = None if path is None else Workdir.at(path).path / "vlm"
    with parsing("the sweep's config"):
        return _resolve(configuration.to_dict(config), vlm)


def _resolve(values: dict[str, Any], vlm: epath.Path | None) -> Sweep:
    if set(values) != set(KEYS):
        raise UserError(f"a sweep's config has the keys {', '.join(KEYS)}; this one has {', '.join(values)}")
    for name, (_, allowed) in (("seeds", range_of(Seed)), ("sample_steps", range_of(NumSteps))):
        given = values[name]
        if not given or len(set(given)) != len(given) or not all(type(n) is int and n in allowed for n in given):
            raise UserError(f"config.{name}={given!r} must be different integers, {allowed}")
    names = [name for name, _ in values["variants"]]
    if not names or len(set(names)) != len(names) or not all(re.fullmatch(r"\w+", name) for name in names):
        raise UserError(f"config.variants must have different names of letters, digits and underscores, not {names}")
    base = resolve_config(values["base"], workdir=vlm)
    _refuse_trained_pathway(base)
    variants = {name: _override(values["base"], name, overrides, vlm) for name, overrides in values["variants"]}
    for name, variant in variants.items():
        if other := [key for key in configuration.differences(variant, base) if key.startswith(VLM_KEYS)]:
            raise UserError(
                f"variant {name} has another VLM than the base config, whose VLM it uses: {'; '.join(other)}"
            )
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
    loss, steps = config.eval.evaluators.get("held_out_loss", {"at": "never"}), config.train.steps
    if loss.get("at", "training") != "training":
        raise UserError(f"variant {name}: a sweep compares held-out losses; list held_out_loss in eval.evaluators")
    if (every := loss.get("every", 0)) and steps % every:
        raise UserError(
            f"variant {name}: eval.evaluators.held_out_loss.every={every} must divide train.steps={steps}, because the "
            "loss of the last step is compared"
        )
    scores = list(drawing_scores(open_evaluators(config, open_data(config))))
    if len(scores) != 1:
        raise UserError(
            f"variant {name}: a sweep compares drawings by one score, but has {len(scores)}; list one in "
            "eval.evaluators, with at='end'"
        )
    return scores[0]


def _override(base: dict[str, Any], name: str, overrides: dict[str, Any], vlm: epath.Path | None) -> Config:
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
    with naming(name):
        variant = resolve_config(values, workdir=vlm)
        _refuse_trained_pathway(variant)
    return variant


@contextlib.contextmanager
def naming(variant: str) -> Iterator[None]:
    """Within it, an error of the user's names the variant."""
    try:
        yield
    except UserError as error:
        raise UserError(f"variant {variant}: {error}") from error
