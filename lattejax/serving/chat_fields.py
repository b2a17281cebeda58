"""The fields of a chat request: its messages as turns, and how the answer is decoded."""

import dataclasses
import math
from typing import Annotated, Any

from lattejax.data.prompts import EncodedPrompt, PromptEncoder, Turn
from lattejax.ranges import Range, Seed
from lattejax.sampling.answers import LEAST_TEMPERATURE, Decoding, TopP
from lattejax.sampling.kept_tokens import MOST_LOGPROBS
from lattejax.serving import pictures
from lattejax.serving.errors import ApiError
from lattejax.serving.fields import Fields
from lattejax.serving.limits import CHARACTERS_PER_TOKEN, Limits

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
ONLY_ZERO = ("frequency_penalty", "presence_penalty")
OF_ANSWERS = ("refusal", "annotations", "audio", "function_call", "tool_calls", "name")  # of messages, without effect
MOST_STOPS = 4

Content = str | list[str | tuple[str, str]]  # texts, and the data URI of each image with the name of its field


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request for an answer; images are not decoded yet."""

    messages: list[tuple[str, Content]]
    decoding: Decoding
    stop: tuple[str, ...]
    is_streamed: bool
    includes_usage: bool
    top_logprobs: int | None


def parse(fields: Fields, limits: Limits) -> Asked:
    """Takes all fields of a request; raises `ApiError` for a bad one."""
    messages = parse_messages(fields, limits)
    if not messages or messages[-1][0] != "user":
        raise fields.error("messages", "must end with a message of the user", "invalid_value")
    is_streamed = fields.take("stream", bool, False)
    asked = Asked(
        messages,
        parse_decoding(fields, limits),
        parse_stop(fields),
        is_streamed,
        parse_stream_options(fields, is_streamed),
        parse_logprobs(fields),
    )
    fields.number("n", Annotated[int, Range(1, 1)], 1)
    for name in ONLY_ZERO:
        fields.number(name, Annotated[float, Range(0, 0)], 0)
    if (form := fields.take("response_format", dict)) not in (None, {"type": "text"}):
        raise fields.error("response_format", f"must be of type text, not {form!r:.60}", "unsupported_value")
    if fields.take("tools", list):
        raise fields.error("tools", "are not supported", "unsupported_value")
    fields.choice("tool_choice", ("none", "auto"))
    fields.ignore(*WITHOUT_EFFECT)
    fields.end()
    return asked


def parse_messages(fields: Fields, limits: Limits) -> list[tuple[str, Content]]:
    """All messages; the first that makes a conversation too long is the last to be parsed."""
    messages, parts, characters = [], 0, 0
    most_parts, most_characters = limits.context_tokens, CHARACTERS_PER_TOKEN * limits.context_tokens
    for i, values in enumerate(fields.need("messages", list)):
        role, content = parse_message(values, f"messages.{i}", most_parts)
        messages.append((role, content))
        parts += len(content)
        characters += sum(len(part) for part in content if isinstance(part, str))
        for count, most, what in ((parts, most_parts, "parts"), (characters, most_characters, "characters")):
            if count > most:
                raise fields.error("messages", f"have more than {most:,} {what}", "context_length_exceeded")
    return messages


def parse_message(values: Any, where: str, most_parts: int) -> tuple[str, Content]:
    fields = Fields(values, where)
    role = ROLES[fields.choice("role", tuple(ROLES)) or fields.need("role", str)]
    fields.ignore(*OF_ANSWERS)
    text = fields.take("content", str) if fields.holds("content", str) else None
    parts = fields.need("content", list) if text is None else [{"type": "text", "text": text}]
    fields.end()
    if not parts:
        raise fields.error("content", "must be a string, or a list of parts", "invalid_type")
    if len(parts) > most_parts:
        raise fields.error("content", f"has {len(parts):,} parts, more than {most_parts:,}", "context_length_exceeded")
    return role, [parse_part(part, f"{where}.content.{i}", role) for i, part in enumerate(parts)]


def parse_part(values: Any, where: str, role: str) -> str | tuple[str, str]:
    fields = Fields(values, where)
    kind = fields.choice("type", ("text", "image_url")) or fields.need("type", str)
    if kind == "text":
        part = fields.need("text", str)
    elif role != "user":
        raise fields.error("type", f"must be text in a message of the {role}", "unsupported_value")
    else:
        image = Fields(fields.need("image_url", dict), fields.name("image_url"))
        part = image.need("url", str), image.name("url")
        image.choice("detail", ("auto", "low", "high"))
        image.end()
    fields.end()
    return part


def parse_decoding(fields: Fields, limits: Limits) -> Decoding:
    tokens = Annotated[int, Range(1, limits.context_tokens)]
    old, new = fields.number("max_tokens", tokens), fields.number("max_completion_tokens", tokens)
    temperature = float(fields.number("temperature", Annotated[float, Range(0, 2)], 0.0))
    return Decoding(
        max_tokens=new or old or Decoding.max_tokens,
        temperature=0.0 if temperature < LEAST_TEMPERATURE else temperature,
        top_p=float(fields.number("top_p", TopP, 1.0)),
        seed=fields.number("seed", Seed, 0),
    )


def parse_stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.take("stop", str) if fields.holds("stop", str) else fields.take("stop", list, [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > MOST_STOPS or not all(isinstance(one, str) and 0 < len(one) <= 256 for one in stop):
        raise fields.error(
            "stop", f"must be a string, or at most {MOST_STOPS}, of 1 to 256 characters", "invalid_value"
        )
    return tuple(stop)


def parse_stream_options(fields: Fields, is_streamed: bool) -> bool:
    if (values := fields.take("stream_options", dict)) is None:
        return False
    if not is_streamed:
        raise fields.error("stream_options", "needs stream: true")
    options = Fields(values, "stream_options")
    wanted = options.take("include_usage", bool, False)
    options.ignore("include_obfuscation")
    options.end()
    return wanted


def parse_logprobs(fields: Fields) -> int | None:
    wanted = fields.take("logprobs", bool, False)
    count = fields.number("top_logprobs", Annotated[int, Range(0, MOST_LOGPROBS)])
    if count is not None and not wanted:
        raise fields.error("top_logprobs", "needs logprobs: true")
    return (count or 0) if wanted else None


def encode(encoder: PromptEncoder, asked: Asked, limits: Limits) -> EncodedPrompt:
    """Encodes the conversation, and decodes its images once their sizes show that it fits; runs in a thread."""
    sent = []

    def part(value: str | tuple[str, str]) -> Any:
        if isinstance(value, str):
            return value
        sent.append(pictures.from_data_uri(value[0], limits.image_pixels, value[1]))
        most = max(limits.request_pixels, limits.image_pixels)
        if (total := sum(math.prod(one.size) for one in sent)) > most:
            text = f"the images have {total:,} pixels; at most {most:,} are read"
            raise ApiError(413, text, value[1], "image_too_large")
        return encoder.image_of_size(*sent[-1].size)

    prompt = encoder.chat([Turn(role, tuple(map(part, content))) for role, content in asked.messages])
    if (length := len(prompt.input_ids)) >= limits.context_tokens:
        text = f"the conversation has {length:,} tokens; at most {limits.context_tokens - 1:,} can be answered"
        raise ApiError(400, text, "messages", "context_length_exceeded")
    return dataclasses.replace(prompt, images=tuple(encoder.read_image(one.decode()) for one in sent))
