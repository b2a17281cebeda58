"""All scores, and when each is taken: `config.eval.evaluators` has a name and settings for each.

To add one, write a file with a class that implements `protocol.Evaluator`, and register it in `EVALUATORS`.
"""

import dataclasses
import importlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from lattejax.configuration import Config
from lattejax.data.examples import Source
from lattejax.errors import UserError
from lattejax.evaluation.protocol import DrawingScore, Evaluator, Report, Subject

# The location of each class. It is imported on demand, because the scores' dependencies are slow to import.
EVALUATORS = {
    "held_out_loss": "lattejax.evaluation.held_out:HeldOutFlowLoss",
    "answers": "lattejax.evaluation.answers:AnswerAccuracy",
    "samples": "lattejax.evaluation.samples:SampleGrid",
    "digits": "lattejax.evaluation.digits:DigitScore",
    "asked": "lattejax.evaluation.asked:AskedScore",
    "words": "lattejax.evaluation.words:WordScore",
    "fid": "lattejax.evaluation.fid:FIDMonitor",
}
TIMES = ("training", "end", "demand", "never")  # `at` of an evaluator
# An evaluation of the first stage, of the second, when a run ends, or when a user asks.
Moment = Literal["pretrain", "train", "end", "demand"]


@dataclasses.dataclass(frozen=True)
class Scheduled:
    name: str
    evaluator: Evaluator
    moments: Sequence[Moment]
    every: int = 0  # only at multiples of this step; 0: at every evaluation
    named_by: frozenset[Any] = frozenset()  # see `_named_by`

    def is_due(self, moment: Moment, step: int) -> bool:
        return moment in self.moments and not (self.every and step % self.every)


def open_evaluators(config: Config, source: Source) -> list[Scheduled]:
    """Makes a run's evaluators, except those with at="never"; raises `UserError` if one is unknown, or does not fit the
    config or the data, or if two taken at the same time have figures of the same names."""
    wanted = {name: each for name, each in config.eval.evaluators.items() if each.get("at") != "never"}
    scheduled = [open_evaluator(name, settings, config, source) for name, settings in wanted.items()]
    if twice := same_figures(scheduled):
        raise UserError(
            f"config.eval.evaluators.{twice[0]} and config.eval.evaluators.{twice[1]} would return figures of the same "
            "names; remove one, or change its at, prefix or guidance"
        )
    return scheduled


def same_figures(scheduled: Sequence["Scheduled"], *, at_once: bool = False) -> tuple[str, str] | None:
    """The names of two that would return figures of the same names at the same time, if there are any: of those on
    demand a user can name one, unless all are taken `at_once`."""
    for first, second in itertools.combinations(scheduled, 2):
        together = set(first.moments) & set(second.moments) - {"demand"}
        if (together or at_once) and first.named_by & second.named_by:
            return first.name, second.name
    return None


def open_evaluator(name: str, settings: dict[str, Any], config: Config, source: Source) -> Scheduled:
    """Makes one evaluator.

    Args:
      name: its name in the config.
      settings: `type`, one of `EVALUATORS`, by default its name; `at`, "training" (default), "end", "demand" or
        "never"; `every`, the steps between two scores in training, by default those between evaluations; and the
        evaluator's own settings.
      config: the run's config.
      source: the run's data.
    """
    settings = dict(settings)
    kind, at, every = settings.pop("type", name), settings.pop("at", "training"), settings.pop("every", 0)
    key = f"config.eval.evaluators.{name}"
    if kind not in EVALUATORS:
        problem = f"{key} is unknown" if kind == name else f"{key}.type={kind!r} is unknown"
        raise UserError(f"{problem}; use some of {', '.join(EVALUATORS)}")
    if at not in TIMES:
        raise UserError(f"{key}.at={at!r} must be one of {', '.join(TIMES)}")
    if type(every) is not int or every < 0 or (every and (not config.eval.every or every % config.eval.every)):
        raise UserError(
            f"{key}.every={every!r} must be a multiple of eval.every={config.eval.every}, or 0 for each evaluation"
        )
    if every and at != "training":
        raise UserError(f"{key}.every={every} needs at='training', not {at!r}")
    module, _, cls = EVALUATORS[kind].partition(":")
    try:
        evaluator = getattr(importlib.import_module(module), cls).open(config, source, **settings)
    except TypeError as error:  # an unknown setting, or one of the wrong type
        raise UserError(f"{key}={settings!r}: {error}") from error
    except (UserError, ValueError) as error:
        raise UserError(f"{key}: {error}") from error
    moments = _in_training(evaluator, config) if at == "training" else [at]
    return Scheduled(name, evaluator, moments, every, _named_by(kind, evaluator, settings))


def _named_by(kind: str, evaluator: Evaluator, settings: dict[str, Any]) -> frozenset[Any]:
    """What the names of its figures depend on. Two scores that share one of these return figures of the same names. A
    class that does not tell (see `Evaluator`) shares them only with the same settings."""
    keys = getattr(evaluator, "named_by", [json.dumps(settings, sort_keys=True)])
    return frozenset((kind, key) for key in keys)


def _in_training(evaluator: Evaluator, config: Config) -> list[Moment]:
    """The stages that train the part that it judges."""
    if evaluator.judges == "pathway":
        return ["train"]
    return ["pretrain", "train"] if config.trains_answers else ["pretrain"]


def due(scheduled: Iterable[Scheduled], moment: Moment, step: int = 0) -> list[Evaluator]:
    return [one.evaluator for one in scheduled if one.is_due(moment, step)]


def take_scores(evaluators: Iterable[Evaluator], subject: Subject) -> Report:
    """Takes all of these scores.

    Raises:
      UserError: two of them have a figure or a picture of the same name.
    """
    complete = Report()
    for evaluator in evaluators:
        report = evaluator(subject)
        for kept, found in ((complete.figures, report.figures), (complete.pictures, report.pictures)):
            if twice := kept.keys() & found.keys():
                raise UserError(f"two evaluators return {', '.join(sorted(twice))}")
            kept.update(found)
    return complete


def drawing_scores(scheduled: Iterable[Scheduled]) -> Iterator[DrawingScore]:
    """The scores at the end of a run that need drawings only."""
    for evaluator in due(scheduled, "end"):
        if hasattr(evaluator, "score"):
            yield evaluator
