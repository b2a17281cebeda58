"""What tasks of lmms-eval show a model, as turns of a chat."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from lattejax.data.images import open_image
from lattejax.data.prompts import PromptEncoder, ReadableImage, Turn
from lattejax.errors import UserError

IMAGE_TAG = "<image>"  # in contexts of tasks, where LLaVA shows an image


def user_turn(encoder: PromptEncoder, context: str, visuals: Any) -> Turn:
    """All images before the text, as lmms-eval's own Qwen2-VL has them.

    Args:
      encoder: reads the images.
      context: the text; its image tags are left out.
      visuals: what a task's `doc_to_visual` returns: images, one image, or None.
    """
    visuals = [] if visuals is None else visuals if isinstance(visuals, Sequence) else [visuals]
    if isinstance(visuals, str):
        visuals = [visuals]
    if len(visuals) == 1 and isinstance(visuals[0], list):
        visuals = visuals[0]
    return Turn("user", (*(_read(encoder, visual) for visual in visuals), context.replace(IMAGE_TAG, "")))


def turns_of(encoder: PromptEncoder, messages: Sequence[dict[str, Any]]) -> list[Turn]:
    """Messages in lmms-eval's chat protocol: images and texts in any order."""

    def part(content: dict[str, Any]) -> str | ReadableImage:
        if content["type"] == "text":
            return content["text"]
        if content["type"] == "image":
            return _read(encoder, content["url"])
        raise UserError(f"a message has content of type {content['type']!r}; only text and images are supported")

    return [
        Turn(message["role"], content if isinstance(content := message["content"], str) else list(map(part, content)))
        for message in messages
    ]


def drawing(turns: Sequence[Turn]) -> tuple[str, tuple[ReadableImage, ...]]:
    """What the user's turns ask to draw: the text, and the images it is conditioned on."""
    asked = [turn for turn in turns if turn.role == "user"]
    return "\n".join(turn.text for turn in asked), tuple(image for turn in asked for image in turn.images)


def _read(encoder: PromptEncoder, visual: Any) -> ReadableImage:
    if isinstance(visual, str) and visual.rpartition(".")[2].lower() in ("png", "jpg", "jpeg", "bmp", "gif", "webp"):
        visual = open_image(visual)
    if not isinstance(visual, Image.Image):
        raise UserError(f"a document shows {visual!r:.100}; only images are supported, no video or sound")
    return encoder.read_image(visual)
