"""The scores there are, and when each is taken.

Which are taken follows from the config: the held-out loss and a grid of samples at every evaluation of the pathway,
answers where questions are trained on, digits where `eval.scored_images` and `eval.final_images` ask for them. Others
are listed in `config.eval.evaluators`, by name with their settings. To add one, write a file with a class that does
what `protocol.Evaluator` says, and name it in `EVALUATORS`.
"""

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lattejax.configuration import Config
from lattejax.data.examples import Source
from lattejax.errors import UserError
from lattejax.evaluation.protocol import DrawingScore, Evaluator, Report, Subject

# Where each class is: it is imported when it is asked for, since what scores need is slow to import.
EVALUATORS = {
    "held_out_loss": "lattejax.evaluation.held_out:HeldOutFlowLoss",
    "answers": "lattejax.evaluation.answers:AnswerAccuracy",
    "samples": "lattejax.evaluation.samples:SampleGrid",
    "digits": "lattejax.evaluation.digits:DigitScore",
    "final_digits": "lattejax.evaluation.digits:FinalDigitScore",
}
# In which evaluations: of the first stage, of the second, or when a run ends.
Moment = Literal["pretrain", "train", "end"]


@dataclasses.dataclass(frozen=True)
class Scheduled:
    evaluator: Evaluator
    moments: Sequence[Moment]
    every: int = 1  # at evaluations whose step this divides


def open_evaluators(config: Config, source: Source) -> list[Scheduled]:
    """Makes a run's evaluators; raises `UserError` for what is unknown, or does not fit config or data."""
    scheduled = [
        Scheduled(_open("held_out_loss", config, source), ["train"]),
        Scheduled(_open("samples", config, source), ["train"]),
    ]
    if source.has_questions:
        moments = ["pretrain", "train"] if config.trains_answers else ["pretrain"]
        scheduled.append(Scheduled(_open("answers", config, source, examples=config.eval.examples), moments))
        scheduled.append(Scheduled(_open("answers", config, source), ["end"]))
    if config.eval.scored_images:
        scheduled.append(Scheduled(_open("digits", config, source, images=config.eval.scored_images), ["train"]))
    if config.eval.final_images:
        scheduled.append(Scheduled(_open("final_digits", config, source, images=config.eval.final_images), ["end"]))
    for name in config.eval.evaluators:
        extra = _extra(name, config, source)
        if any(type(one.evaluator) is type(extra.evaluator) and {*one.moments} & {*extra.moments} for one in scheduled):
            raise UserError(f"config.eval.evaluators.{name} is taken then without being listed")
        scheduled.append(extra)
    return scheduled


def _open(name: str, config: Config, source: Source, **settings: Any) -> Evaluator:
    module, _, cls = EVALUATORS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), cls).open(config, source, **settings)
    except TypeError as error:  # an unknown setting, or one of another type
        raise UserError(f"config.eval.evaluators.{name}={settings!r}: {error}") from error


def _extra(name: str, config: Config, source: Source) -> Scheduled:
    """One of config.eval.evaluators: taken every so many steps (`every`) of the second stage, or at the run's end."""
    settings = dict(config.eval.evaluators[name])
    every = settings.pop("every", 0)
    if name not in EVALUATORS:
        raise UserError(f"config.eval.evaluators.{name} is unknown; use some of {', '.join(EVALUATORS)}")
    if type(every) is not int or every < 0 or (every and (not config.eval.every or every % config.eval.every)):
        raise UserError(
            f"config.eval.evaluators.{name}.every={every!r} must be a multiple of eval.every={config.eval.every}, or 0 "
            "for the end of the run"
        )
    return Scheduled(_open(name, config, source, **settings), ["train"] if every else ["end"], every or 1)


def take_scores(scheduled: Sequence[Scheduled], moment: Moment, subject: Subject, step: int = 0) -> Report:
    """The scores that are due.

    Raises:
      UserError: two of them have a figure or a picture of the same name.
    """
    whole = Report()
    for one in scheduled:
        if moment not in one.moments or step % one.every:
            continue
        report = one.evaluator(subject)
        for kept, found in ((whole.figures, report.figures), (whole.pictures, report.pictures)):
            if twice := kept.keys() & found.keys():
                raise UserError(f"two evaluators return {', '.join(sorted(twice))}")
            kept.update(found)
    return whole


def drawing_scores(scheduled: Sequence[Scheduled]) -> Iterator[DrawingScore]:
    """Those at the end of a run that score drawings alone."""
    for one in scheduled:
        if "end" in one.moments and hasattr(one.evaluator, "score"):
            yield one.evaluator
