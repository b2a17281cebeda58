"""Connections whose clients must send a request's head in time. uvicorn waits for it without end."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """Closes itself if the head of a request has not come `client_seconds` after the client could begin to send it.

    The first head counts from the connection on; a later one, from its first bytes. Before these, uvicorn's own timeout
    for idle connections holds.
    """

    def __init__(self, client_seconds: float, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._client_seconds, self._waiting = client_seconds, None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        has_head = self.cycle is not None and not self.cycle.response_complete
        if has_head or self.timeout_keep_alive_task is not None:
            self._forget()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(self._client_seconds, self.transport.close)

    def _forget(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
