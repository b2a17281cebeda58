"""Server-sent events: responses that come in parts."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from lattejax.serving.errors import ApiError

DONE = b"data: [DONE]\n\n"


def event(values: dict[str, Any], name: str | None = None) -> bytes:
    """One event; its data are JSON in one line."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(values, ensure_ascii=False)}\n\n".encode()


def stream(parts: AsyncIterator[bytes]) -> StreamingResponse:
    """A response of events. An error after the first of them is an event, too."""

    async def guarded() -> AsyncIterator[bytes]:
        try:
            async for part in parts:
                yield part
        except ApiError as error:
            yield event(error.body, "error")

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies pass each part on at once
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)
