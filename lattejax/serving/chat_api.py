"""POST /v1/chat/completions: conversations of several turns, with images."""

import contextlib
import functools
import secrets
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lattejax.data.prompts import EncodedPrompt
from lattejax.sampling.streams import TextStream
from lattejax.serving import chat_fields
from lattejax.serving.chat_fields import Asked
from lattejax.serving.events import DONE, event, stream
from lattejax.serving.fields import read_fields
from lattejax.serving.jobs import Chat, Token
from lattejax.serving.service import Listener, Service, now

ENDPOINT = "chat"
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of a byte-level token's text


class Completion:
    """An answer as it comes."""

    def __init__(self, service: Service, request: Request, asked: Asked, prompt: EncodedPrompt):
        self._service, self._request, self._asked, self._prompt = service, request, asked, prompt
        self._text = TextStream(service.model.encoder.tokenizer, asked.stop)
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", now()
        self.finish_reason, self._tokens, self._cached = "length", 0, 0

    async def pieces(self, listener: Listener) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
        """Yields pieces of text, and what is known of the token that came with each."""
        async with contextlib.aclosing(listener.events()) as events:
            async for told in events:
                if isinstance(told, Token):
                    if not self._tokens:
                        self._service.metrics.first(ENDPOINT, self._request.state.seconds())
                    self._tokens += 1
                    self._cached = told.cached_tokens
                    if told.token in self._service.model.encoder.stop_tokens:
                        self.finish_reason = "stop"
                    piece = self._text.add(told.token)
                    yield piece, [] if told.logprob is None else [self._describe(told.token, *told.logprob)]
                    if self._text.stopped:
                        self.finish_reason = "stop"
                        return
        rest = self._text.end()
        if self._text.stopped:
            self.finish_reason = "stop"
        if rest:
            yield rest, []

    def _describe(self, token: int, logprob: float, others: list[tuple[int, float]]) -> dict[str, Any]:
        top = [self._of_token(other, value) for other, value in others]
        return self._of_token(token, logprob) | {"top_logprobs": top}

    def _of_token(self, token: int, logprob: float) -> dict[str, Any]:
        tokenizer = self._service.model.encoder.tokenizer
        text = tokenizer.convert_ids_to_tokens(token)
        if text is None:  # the vocabulary is smaller than the model's
            return {"token": "", "logprob": logprob, "bytes": None}
        is_plain = all(character in BYTES for character in text) and token not in tokenizer.added_tokens_decoder
        data = bytes(BYTES[character] for character in text) if is_plain else text.encode()
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    @property
    def usage(self) -> dict[str, Any]:
        prompt = len(self._prompt.input_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    def values(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self._service.model.name,
            "choices": choices,
        }


async def complete(service: Service, request: Request) -> Response:
    """Answers a conversation."""
    fields = await read_fields(request, service.limits)
    service.check_model(fields.take("model", str))
    asked = chat_fields.parse(fields, service.limits)
    prompt = await service.prepare(request, chat_fields.encode, service.model.encoder, asked, service.limits)
    request.state.details = f"prompt_tokens={len(prompt.input_ids)}"
    make = functools.partial(make_job, prompt, asked)
    listener = service.submit(request, make)
    completion = Completion(service, request, asked, prompt)
    if asked.is_streamed:
        return stream(streamed(completion, listener, asked))
    text, logprobs = "", []
    async for piece, described in completion.pieces(listener):
        text += piece
        logprobs += described
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "finish_reason": completion.finish_reason,
        "logprobs": None if asked.top_logprobs is None else {"content": logprobs, "refusal": None},
    }
    return JSONResponse(completion.values("chat.completion", [choice]) | {"usage": completion.usage})


def make_job(prompt: EncodedPrompt, asked: Asked, tell: Any) -> Chat:
    return Chat(prompt, tell, asked.decoding, asked.top_logprobs)


async def streamed(completion: Completion, listener: Listener, asked: Asked) -> AsyncIterator[bytes]:
    """Events: the role, pieces of text, why the answer has ended, and if it is wanted, the usage."""

    def chunk(delta: dict[str, Any], reason: str | None = None, logprobs: list[dict[str, Any]] | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        choice["logprobs"] = {"content": logprobs, "refusal": None} if logprobs else None
        values = completion.values("chat.completion.chunk", [choice])
        return event(values | ({"usage": None} if asked.includes_usage else {}))

    yield chunk({"role": "assistant", "content": ""})
    async for piece, described in completion.pieces(listener):
        if piece or described:
            yield chunk({"content": piece}, logprobs=described)
    yield chunk({}, completion.finish_reason)
    if asked.includes_usage:
        yield event(completion.values("chat.completion.chunk", []) | {"usage": completion.usage})
    yield DONE
