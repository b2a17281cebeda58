"""The fields of a request's JSON body: each is taken with its type and range, and what is left is unknown."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request

from lattejax.ranges import Range, range_of
from lattejax.serving.errors import ApiError, ClientGone
from lattejax.serving.limits import Limits

NAMES = {
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
    int: "an integer",
    float: "a number",
}


class Fields:
    """The fields of a JSON object; `null` counts as absent."""

    def __init__(self, values: Any, where: str = ""):
        if not isinstance(values, dict):
            raise ApiError(400, f"{where or 'the body'} must be an object", where or None, "invalid_type")
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where = where

    def name(self, field: str) -> str:
        return f"{self._where}.{field}" if self._where else field

    def take(self, field: str, kind: type, default: Any = None) -> Any:
        """A field of a type, or the default if it is absent."""
        if field not in self._values:
            return default
        value = self._values.pop(field)
        fits = type(value) in (int, float) if kind is float else type(value) is kind
        if not fits:
            raise self.error(field, f"must be {NAMES[kind]}, not {value!r:.60}", "invalid_type")
        return value

    def holds(self, field: str, kind: type) -> bool:
        """Whether a field is there and of a type."""
        return type(self._values.get(field)) is kind

    def need(self, field: str, kind: type) -> Any:
        """A field that must be there."""
        if field not in self._values:
            raise self.error(field, "is missing", "missing_required_parameter")
        return self.take(field, kind)

    def number(self, field: str, kind: Any, default: Any = None, most: float | None = None) -> Any:
        """A number of an annotated type (see `ranges`), at most `most`."""
        of_type, allowed = range_of(kind)
        value = self.take(field, of_type)
        if value is None:
            return default
        if most is not None:
            allowed = Range(allowed.least, most, allowed.above)
        if value not in allowed:
            raise self.error(field, f"must be {allowed}, not {value!r:.60}", "out_of_range")
        return value

    def choice(self, field: str, allowed: Sequence[str], default: str | None = None) -> str | None:
        """One of some strings."""
        value = self.take(field, str, default)
        if value is not None and value not in allowed:
            raise self.error(field, f"must be one of {', '.join(allowed)}, not {value!r:.60}", "unsupported_value")
        return value

    def ignore(self, *fields: str) -> None:
        """Fields that have no effect here."""
        for field in fields:
            self._values.pop(field, None)

    def end(self) -> None:
        """Raises for a field that was not taken."""
        for field in self._values:
            name = self.name(field)[:100].encode(errors="backslashreplace").decode()  # half a character has no UTF-8
            raise ApiError(400, f"unknown field '{name}'", name, "unknown_parameter")

    def error(self, field: str, text: str, code: str | None = None) -> ApiError:
        name = self.name(field)
        return ApiError(400, f"{name} {text}", name, code)


async def read_fields(request: Request, limits: Limits) -> Fields:
    """Reads a body of JSON.

    Raises:
      ApiError: it is too large, comes too slowly, or is no JSON object.
      ClientGone: it ends early.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    too_large = ApiError(413, f"the body is larger than {limits.body_bytes:,} bytes", code="body_too_large")
    if int(request.headers.get("content-length", 0)) > limits.body_bytes:  # a number, or the HTTP parser refuses it
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.client_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body has not come within {limits.client_seconds:g} seconds") from None
    except ClientDisconnect:
        raise ClientGone from None
    if sum(map(body.count, (b"{", b"[", b","))) > limits.marks:
        raise ApiError(
            413, f"the body has more than {limits.marks:,} braces, brackets and commas", code="body_too_large"
        )
    try:
        return Fields(json.loads(body, parse_constant=_no_number))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:200]}", code="invalid_json") from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")
