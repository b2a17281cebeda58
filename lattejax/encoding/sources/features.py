"""Records of named features, nested and repeated, for the sources whose keys the config names."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lattejax.configuration import Images
from lattejax.encoding.items import Item, Picture, make_item
from lattejax.errors import UserError

CHUNK = 32  # records read at a time
NO_LABEL = "it has no label; choose a split whose pictures are labelled"


def decoded(value: Any, key: str) -> Any:
    """A text that is stored as bytes; another value unchanged. Raises `UserError` if it is not UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"its {key} is not UTF-8: {error}") from error
    return value


def value_at(record: Any, path: str) -> Any:
    """The value at a path of keys, such as "json/conversations"."""
    for key in path.split("/"):
        if not isinstance(record, dict) or key not in record:
            raise UserError(f"it has no {path!r}")
        record = record[key]
    return record


def values_at(record: Any, path: str) -> list[Any]:
    """All values at a path, such as "captions/text", through dicts, and lists of dicts or dicts of lists."""
    values = _elements(record)
    for key in path.split("/"):
        if not all(isinstance(value, dict) and key in value for value in values):
            raise UserError(f"it has no {path!r}")
        values = [inner for value in values for inner in _elements(value[key])]
    return values


def _elements(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return [inner for element in value for inner in _elements(element)]
    return [value]


def keyed_item(
    name: str,
    record: Any,
    images: Images,
    picture: Callable[[Any, str], Picture],
    text: Callable[[str, Any], Any] = lambda key, value: value,
) -> Item:
    """A record as an item, by the keys of the config.

    Args:
      name: names the record.
      record: its features.
      images: names the keys.
      picture: makes a picture of a value and a name.
      text: makes a text of a key and a value; texts remain as they are.

    Raises:
      UserError: it lacks a feature, or see `make_item`.
    """

    def pictures(key: str) -> list[Picture]:
        values = values_at(record, key) if key else []
        return [picture(value, f"{name}, {key}{f' {i}' if i else ''}") for i, value in enumerate(values)]

    def texts(key: str) -> list[Any]:
        return [text(key, value) for value in values_at(record, key)] if key else []

    own, shown = pictures(images.image_key), pictures(images.prompt_image_key)
    captions, questions = texts(images.caption_key), []
    if captions and len(own) != 1:
        raise UserError(f"it has a text and {len(own)} images; a text describes one")
    if images.question_key:
        questions += pair_up(texts(images.question_key), texts(images.answer_key))
    if images.conversations_key:
        told = _mapped(value_at(record, images.conversations_key), lambda value: text(images.conversations_key, value))
        questions += conversations(told)
    return make_item(
        name,
        [*own, *shown],
        captions=captions,
        questions=questions,
        drawn=0 if captions else None,
        shown=range(len(own), len(own) + len(shown)),
    )


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A nested value with each of its innermost values changed."""
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return [_mapped(inner, change) for inner in value]
    return change(value)


def pair_up(questions: list[Any], answers: list[Any]) -> list[dict[str, Any]]:
    """Questions with their answers. Several answers to one question are alternatives, of which the first counts."""
    if len(questions) == 1 and len(answers) > 1:
        answers = answers[:1]
    if len(questions) != len(answers):
        raise UserError(f"it has {len(questions)} questions and {len(answers)} answers")
    return [{"question": question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]


def conversations(value: Any) -> list[Any]:
    """One conversation, or a list of them; a data set may store a list of messages as a dict of lists."""
    if isinstance(value, dict):
        if not all(isinstance(of_key, list | tuple | np.ndarray) for of_key in value.values()):
            raise UserError(f"its conversations are {value!r:.60}, neither a list nor a dict of lists")
        if len(lengths := {len(of_key) for of_key in value.values()}) > 1:
            raise UserError(f"its conversations are lists of different lengths: {', '.join(map(str, sorted(lengths)))}")
        value = [dict(zip(value, one, strict=True)) for one in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise UserError(f"its conversations are {value!r:.60}, not a list")
    if value and isinstance(value[0], dict) and not value[0].keys() & {"question", "conversations", "messages"}:
        return [list(value)]
    return list(value)


def read_in_chunks(records: Any, indices: range) -> Iterator[tuple[int, Any]]:
    """Indices and records of a data set that reads several at once."""
    chosen = iter(indices)
    while chunk := list(itertools.islice(chosen, CHUNK)):
        yield from zip(chunk, records.__getitems__(chunk), strict=True)


def check_keys(images: Images, known: Sequence[str]) -> None:
    """Raises `UserError` unless the config names a text or a question, each with what it needs."""
    if not (images.caption_key or images.question_key or images.conversations_key):
        raise UserError(
            "config.images names no feature with texts; set caption_key, question_key and answer_key, or "
            f"conversations_key; known are {', '.join(known)}"
        )
    if bool(images.question_key) != bool(images.answer_key):
        raise UserError("config.images.question_key and answer_key belong together; set both or neither")
