"""What a request's `args` mean. They differ between lmms-eval's simple models, whose tasks make a context and images,
and its chat models, whose tasks make messages."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lattejax.data.prompts import PromptEncoder, Turn
from lattejax.harness.documents import turns_of, user_turn


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked for; its images are read when `turns` is called."""

    turns: Callable[[], list[Turn]]
    options: dict[str, Any]  # the task's generation_kwargs
    task: str
    doc_id: int


class Round(NamedTuple):
    """What a task makes of the answers so far."""

    asked: Asked | None  # None: the last round was before
    answers: Sequence[str] | None  # as the task wants them; None: as they are
    state: Any  # the task's own


@dataclasses.dataclass(frozen=True, eq=False)
class SimpleRequests:
    """Requests for a simple model.

    Args:
      encoder: reads images.
      opening: turns before all others.
      document: returns the document of a task, a split and a number.
    """

    encoder: PromptEncoder
    opening: tuple[Turn, ...]
    document: Callable[[str, str, int], Any]

    def question(self, context: str, doc_to_visual: Callable, doc_id: int, task: str, split: str) -> list[Turn]:
        visuals = doc_to_visual(self.document(task, split, doc_id))
        return [*self.opening, user_turn(self.encoder, context, visuals)]

    def only(self, context: str, options: dict, doc_to_visual: Callable, *place: Any) -> Asked:
        """`place`: the document's number, task and split."""
        doc_id, task, _ = place
        return Asked(functools.partial(self.question, context, doc_to_visual, *place), options, task, doc_id)

    def first(self, context: str, options: dict, doc_to_visual: Callable, doc_to_text: Callable, *place: Any) -> Asked:
        return self.only(context, options, doc_to_visual, *place)

    def following(self, args: tuple, number: int, said: list[str], state: Any) -> Round:
        _, options, _, doc_to_text, doc_id, task, split = args
        document = self.document(task, split, doc_id)
        made = doc_to_text(document, previous_output=list(said), round_idx=number, previous_round_info=state)
        if not (isinstance(made, tuple) and len(made) == 5):
            return Round(None, None, state)  # the task has one round
        visuals, context, is_last, answers, state = made
        asked = None if is_last else self.only(context, options, lambda _: visuals, doc_id, task, split)
        return Round(asked, answers, state)


class ChatRequests(SimpleRequests):
    """Requests for a chat model."""

    def only(self, context: str, doc_to_messages: Callable, options: dict, *place: Any) -> Asked:
        doc_id, task, split = place
        return self._asked(lambda: doc_to_messages(self.document(task, split, doc_id)), options, task, doc_id)

    first = only

    def following(self, args: tuple, number: int, said: list[str], state: Any) -> Round:
        _, doc_to_messages, options, doc_id, task, split = args
        document = self.document(task, split, doc_id)
        made = doc_to_messages(document, round_idx=number, previous_output=list(said), previous_round_info=state)
        if not (isinstance(made, tuple) and len(made) == 4):
            return Round(None, None, state)
        messages, is_last, answers, state = made
        return Round(None if is_last else self._asked(lambda: messages, options, task, doc_id), answers, state)

    def _asked(self, messages: Callable, options: dict, task: str, doc_id: int) -> Asked:
        def turns() -> list[Turn]:
            made = turns_of(self.encoder, messages())
            return made if made and made[0].role == "system" else [*self.opening, *made]

        return Asked(turns, options, task, doc_id)
