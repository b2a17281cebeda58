"""Before and after every request: whose it is, whether it may come in, its line in the log, its figures."""

import asyncio
import contextlib
import hmac
import ipaddress
import time
import traceback
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lattejax.serving.errors import GONE, ApiError, ClientGone, as_api_error
from lattejax.serving.metrics import Metrics

ENDPOINTS = {"/v1/images/generations": "images", "/v1/chat/completions": "chat"}


class Front:
    """Wraps the application.

    Args:
      app: the application.
      metrics: where requests are counted.
      api_key: the key that clients must send; empty: none.
      local_host: the server's address if only this machine reaches it; None: others do. Without a key, requests to a
        local server must be addressed to it or to another local name, so that no web page of another name can reach it
        (DNS rebinding).
      client_seconds: how long a client may take to read a part of a response.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str, local_host: str | None, client_seconds: float):
        self._app, self._metrics, self._api_key = app, metrics, api_key.encode()
        self._local_host, self._client_seconds = local_host, client_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), GONE
        state = scope.setdefault("state", {})
        state["seconds"] = lambda: time.monotonic() - start

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                async with asyncio.timeout(self._client_seconds):
                    await send(message)
            except (TimeoutError, OSError):  # it does not read, or is gone
                raise ClientGone from None

        try:
            self._check(scope)
            await self._app(scope, receive, sending)
        except ClientGone:
            status = GONE
        except ApiError as error:
            await error.response(scope, receive, sending)
        except Exception as error:
            traceback.print_exc()
            if status == GONE:
                await as_api_error(error).response(scope, receive, sending)
        finally:
            status = GONE if state.get("is_gone") else status
            self._note(scope, status, time.monotonic() - start)

    def _check(self, scope: Scope) -> None:
        """Raises `ApiError` for a request that may not come in."""
        headers = Headers(scope=scope)
        if self._local_host is not None and not self._api_key:
            name = host_name(headers.get("host", ""))
            if name not in ("localhost", self._local_host.lower()) and not is_loopback(name):
                raise ApiError(403, f"without an API key, this server is only for requests to {self._local_host}")
        needs_key = scope["path"].startswith("/v1/") or scope["path"] in ("/metrics", "/card")
        if not self._api_key or not needs_key:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key):
            raise ApiError(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path, state = scope.get("raw_path", b"").decode("ascii", "backslashreplace"), scope["state"]
        self._metrics.responded(ENDPOINTS.get(scope["path"], "other"), status, seconds)
        line: list[Any] = [scope["method"], path, status, f"{seconds:.3f}s", state.get("details", "")]
        with contextlib.suppress(BrokenPipeError):  # nobody reads the log
            print(*[part for part in line if part != ""], flush=True)


def is_loopback(name: str | None) -> bool:
    """Whether a name is an address of this machine that no other reaches."""
    try:
        return ipaddress.ip_address(name or "").is_loopback
    except ValueError:
        return False


def host_name(host: str) -> str | None:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
