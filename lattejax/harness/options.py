"""A task's generation options, in lmms-eval's names, as `Decoding`."""

import dataclasses
import functools
from typing import Any

from absl import logging

from lattejax.errors import UserError
from lattejax.sampling.answers import Decoding

KNOWN = ("until", "stop_sequences", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")
KNOWN += ("repetition_penalty", "num_return_sequences", "n", "best_of", "seed")
WITHOUT_EFFECT = ("image_aspect_ratio", "visual_cot", "use_cache", "max_agentic_steps")  # for other models


@dataclasses.dataclass(frozen=True)
class Options:
    """How an answer is decoded, and the texts before which it ends."""

    decoding: Decoding
    stop: tuple[str, ...]


def read_options(options: dict[str, Any], default: Decoding, penalty: float) -> Options:
    """Reads a task's `generation_kwargs`.

    Tokens are sampled if `do_sample` says so, or else if `temperature` is above 0.

    Args:
      options: the task's.
      default: the longest answer, and the seed, if the task does not say.
      penalty: the model's own repetition penalty.

    Raises:
      UserError: they ask for what is not supported, or a number is out of its range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in sorted(given.keys() - {*KNOWN, *WITHOUT_EFFECT}):
        _warn(name)
    temperature, is_sampled = given.get("temperature", 1.0), given.get("do_sample", given.get("temperature", 0) > 0)
    if not is_sampled or temperature == 0:
        given["temperature"] = given["top_k"] = 0
        given["top_p"] = 1.0
    only = {"num_beams": 1, "num_return_sequences": 1, "n": 1, "best_of": 1, "repetition_penalty": penalty, "top_k": 0}
    for name, value in only.items():
        if given.get(name, value) != value:
            raise UserError(f"generation_kwargs: {name}={given[name]!r} is not supported; only {value} is")
    try:
        decoding = Decoding(
            given.get("max_new_tokens", default.max_tokens),
            float(given.get("temperature", 1.0)),
            float(given.get("top_p", 1.0)),
            given.get("seed", default.seed),
        )
    except ValueError as error:
        raise UserError(f"generation_kwargs: {error}") from error
    return Options(decoding, (*_texts(given, "until"), *_texts(given, "stop_sequences")))


def _texts(given: dict[str, Any], name: str) -> tuple[str, ...]:
    """A text, or several; empty ones end nothing."""
    texts = given.get(name, ())
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"generation_kwargs: {name}={texts!r} must be texts")
    return tuple(filter(None, texts))


@functools.cache
def _warn(name: str) -> None:
    """Once for each name."""
    logging.warning("generation_kwargs: %s is unknown and ignored", name)
