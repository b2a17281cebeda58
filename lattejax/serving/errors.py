"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
GONE = 499  # the client has closed the connection: the status in the log, as nginx has it


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return JSONResponse(self.body, self.status, headers)


class ClientGone(Exception):
    """The client has closed the connection, or does not read."""


async def respond(request: Request, error: Exception) -> JSONResponse:
    """The response to an error that an endpoint has raised."""
    return as_api_error(error).response


def as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if (status := getattr(error, "status_code", None)) is not None:  # starlette's: no such path or method
        return ApiError(status, f"{error.detail}: see /v1/models, /v1/chat/completions, /v1/images/generations")
    return ApiError(500, "the server has failed; its log says why", code="internal_error")
