"""Conversations about pictures, as they are stored."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Content = tuple[str | int, ...]  # texts, and indices of pictures


class Message(NamedTuple):
    role: str  # "system", "user" or "assistant"
    content: Content


Conversation = tuple[Message, ...]


def to_json(talk: Conversation) -> list[Any]:
    return [[role, list(content)] for role, content in talk]


def from_json(values: list[Any]) -> Conversation:
    return tuple(Message(role, tuple(content)) for role, content in values)


def text_of(content: Content) -> str:
    """Its texts alone, in lines."""
    return "\n".join(part for part in content if isinstance(part, str))


def up_to_answer(talk: Conversation, turn: int) -> Conversation:
    """The conversation up to and including one of its answers: 0 the first, −1 the last."""
    answers = [place for place, message in enumerate(talk) if message.role == "assistant"]
    return talk[: answers[turn] + 1]


def renumbered(talk: Conversation, places: Mapping[int, int]) -> Conversation:
    """The conversation with other indices for its pictures."""
    return tuple(
        Message(role, tuple(part if isinstance(part, str) else places[part] for part in content))
        for role, content in talk
    )
