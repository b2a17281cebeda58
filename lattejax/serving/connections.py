"""Connections whose clients must send a request's head in time, and read the response. uvicorn waits without end."""

import asyncio
import fcntl
import struct
import sys
import termios
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """Closes itself if the head of a request has not come `client_seconds` after the client could begin to send it.

    The first head counts from the connection on; a later one, from its first bytes. Before these, uvicorn's own timeout
    for idle connections holds.

    When a response has been written, or the connection is to be closed, it is ended if the client reads nothing of the
    rest for `client_seconds`. Until then `Front` watches.
    """

    def __init__(self, client_seconds: float, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._client_seconds, self._waiting, self._draining = client_seconds, None, None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()
        self._watch_rest(0, None)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._draining.cancel()
        super().connection_lost(exc)

    @property
    def _is_responding(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_rest(self, before: int, of: Any) -> None:
        """`before`: how many bytes of the response `of` were to be read `client_seconds` ago; 0: none, or it grew."""
        rest = self.transport.get_write_buffer_size() + self._queued
        if of is self.cycle and 0 < before <= rest:
            self.transport.abort()
            return
        grows = self._is_responding and not self.transport.is_closing()
        self._draining = self.loop.call_later(self._client_seconds, self._watch_rest, 0 if grows else rest, self.cycle)

    @property
    def _queued(self) -> int:
        """Bytes that Linux holds, and the client has not acknowledged: they go in smaller steps than the rest."""
        fileno = self.transport.get_extra_info("socket").fileno()
        if fileno < 0 or sys.platform != "linux":
            return 0
        return struct.unpack("i", fcntl.ioctl(fileno, termios.TIOCOUTQ, bytes(4)))[0]

    def _watch(self) -> None:
        if self._is_responding or self.timeout_keep_alive_task is not None:
            self._forget()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(self._client_seconds, self.transport.close)

    def _forget(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
