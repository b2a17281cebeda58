"""Records to encode: a picture to draw with its prompts, conversations about pictures, or both.

A text may contain marks, `<image>`, where pictures stand. A content is a tuple of texts and of indices of pictures.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lattejax.data.conversations import Content, Conversation, Message
from lattejax.errors import UserError, parsing

MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """An image file of a source: `read` returns its bytes, or raises `UserError`. `size` in bytes is part of what
    identifies it; 0 if it is unknown without reading. `turn`: whether it is rotated as its EXIF data says."""

    name: str
    read: Callable[[], bytes]
    size: int = 0
    turn: bool = True


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text that asks for a drawing, after the pictures with the indices `shown`."""

    text: str
    shown: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """A record: `drawn` is the index of the picture to draw, for each of the `prompts`, if there is one."""

    name: str
    pictures: tuple[Picture, ...] = ()
    drawn: int | None = None
    prompts: tuple[Prompt, ...] = ()
    conversations: tuple[Conversation, ...] = ()
    problem: str = ""  # why it is left out

    @property
    def shown(self) -> list[int]:
        """The indices of the pictures that the vision tower sees, ascending."""
        by_prompts = {index for prompt in self.prompts for index in prompt.shown}
        said = (part for talk in self.conversations for message in talk for part in message.content)
        return sorted(by_prompts | {part for part in said if isinstance(part, int)})

    @property
    def used(self) -> list[int]:
        """The indices of the pictures that are drawn or seen, ascending."""
        return sorted({*self.shown, *(() if self.drawn is None else (self.drawn,))})


def checked(name: str, make: Callable[[], Item]) -> Item:
    """Returns the item, or, if `make` raises an error, one with that problem."""
    try:
        with parsing("it"):
            _check_encodable(name)
            return make()
    except UserError as error:
        return Item(name, problem=f"{name}: {error}")


def _check_encodable(name: str) -> None:
    if name != name.encode(errors="replace").decode():
        raise UserError("its name is not UTF-8; rename it")


def make_item(
    name: str,
    pictures: Sequence[Picture],
    *,
    captions: Any = (),
    questions: Any = (),
    drawn: int | None = None,
    shown: Sequence[int] = (),
) -> Item:
    """Checks the parts of a record.

    Args:
      name: names the record.
      pictures: all of its pictures.
      captions: a text or a list of texts, each of which asks for the picture `drawn`.
      questions: a list, see `parse_questions`.
      drawn: the index of the picture to draw, if there are captions.
      shown: the indices of the pictures that come before the captions.

    Raises:
      UserError: a text is empty or not a text, a conversation is malformed, or the name is not UTF-8.
    """
    _check_encodable(name)
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list | tuple):
        raise UserError(f"its text is {captions!r:.60}, neither a text nor a list of texts")
    prompts = [Prompt(check_text(text, "a text"), tuple(shown)) for text in captions]
    about = [index for index in range(len(pictures)) if index not in shown]
    conversations, drawings = [], []
    for talk in parse_questions(questions, about):
        (drawings if is_drawing(talk) else conversations).append(talk)
    for talk in drawings:
        prompt, its_picture = read_drawing(talk)
        if drawn not in (None, its_picture):
            raise UserError("its answers ask to draw different pictures; one record may draw one")
        drawn = its_picture
        prompts.append(prompt)
    if not prompts and not conversations:
        raise UserError("it has neither a text nor a question")
    prompts = list(dict.fromkeys(prompts))
    return Item(name, tuple(pictures), drawn if prompts else None, tuple(prompts), tuple(conversations))


def check_text(text: Any, what: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{what} is {text!r:.60}, not a text")
    if not text.strip():
        raise UserError(f"{what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} has half a surrogate pair: {text!r:.60}") from None
    return text.strip()


# ---- Conversations


def parse_questions(questions: Any, pictures: Sequence[int]) -> list[Conversation]:
    """Reads a list of questions about pictures, each in one of these forms:

    - `{"question": …, "answer": …}`;
    - a list of messages, `{"role": …, "content": …}`, or in LLaVA's words `{"from": "human" or "gpt", "value": …}`;
    - `{"conversations": [messages]}` or `{"messages": [messages]}`.

    Without marks, all pictures come before the first user's text; otherwise there must be as many marks as pictures.

    Raises:
      UserError: one has another form, an empty text, or another order than user, assistant, user, assistant, ….
    """
    if not isinstance(questions, list | tuple):
        raise UserError(f"its questions are {questions!r:.60}, not a list")
    return [_parse_question(question, pictures) for question in questions]


def _parse_question(question: Any, pictures: Sequence[int]) -> Conversation:
    if isinstance(question, dict):
        messages = question.get("conversations", question.get("messages"))
        if messages is None:
            if not {"question", "answer"} <= question.keys():
                missing = "answer" if "question" in question else "question"
                raise UserError(f"a question has no {missing}: {question!r:.100}")
            messages = [
                {"role": "user", "content": check_text(question["question"], "a question")},
                {"role": "assistant", "content": check_text(question["answer"], "an answer")},
            ]
    else:
        messages = question
    if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"a conversation is {messages!r:.60}, not a list of messages")
    return _place(check_turns([_parse_message(message) for message in messages]), pictures)


def _parse_message(message: dict[str, Any]) -> tuple[str, str]:
    role, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"a message is from {role!r}; known are {', '.join(ROLES)}")
    return ROLES[role], check_text(text, f"a message of the {ROLES[role]}")


def check_turns(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    roles = [role for role, _ in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken:
        raise UserError("a conversation has no messages")
    if spoken[0] != "user":
        raise UserError(f"a conversation begins with the {spoken[0]}; the user begins")
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise UserError(f"a conversation's roles are {', '.join(roles)}; user and assistant must take turns")
    return messages


def _place(messages: list[tuple[str, str]], pictures: Sequence[int]) -> Conversation:
    """Puts pictures where the marks are."""
    marks = sum(text.count(MARK) for _, text in messages)
    if marks not in (0, len(pictures)):
        raise UserError(f"a conversation has {marks} marks {MARK} for {len(pictures)} pictures")
    waiting, turns = iter(pictures), []
    for role, text in messages:
        content: list[str | int] = []
        for number, part in enumerate(text.split(MARK)):
            if number:
                content.append(next(waiting))
            if part.strip():
                content.append(part.strip() if marks else part)
        if role == "user" and not marks:
            content = [*waiting, *content]
        turns.append(Message(role, tuple(content)))
    return tuple(turns)


def is_drawing(talk: Conversation) -> bool:
    """Whether a conversation ends with a picture of the assistant's, which is to be drawn."""
    return any(isinstance(part, int) for message in talk if message.role == "assistant" for part in message.content)


def read_drawing(talk: Conversation) -> tuple[Prompt, int]:
    """The prompt of a conversation whose answer is a picture, and the picture's index."""
    roles = [message.role for message in talk]
    if roles != ["user", "assistant"] or len(talk[1].content) != 1:
        raise UserError("a conversation has a picture in an answer, and is not one request with one picture")
    request: Content = talk[0].content
    texts = [part for part in request if isinstance(part, str)]
    shown = tuple(part for part in request if isinstance(part, int))
    if len(texts) != 1:
        raise UserError("a request for a picture is not one text")
    return Prompt(texts[0], shown), talk[1].content[0]
