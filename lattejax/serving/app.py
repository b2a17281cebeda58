"""The application: its paths, and what answers them."""

import functools
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lattejax.serving import chat_api, errors, images_api
from lattejax.serving.errors import ApiError
from lattejax.serving.front import Front
from lattejax.serving.service import Service

PAGE = Path(__file__).with_name("page")
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
HEADERS = {
    # Everything comes from here: no other origin, no inline script.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_app(service: Service, api_key: str = "", local_host: str | None = "127.0.0.1") -> ASGIApp:
    """The complete application; see `Front` for the last two arguments."""

    async def generate(request: Request) -> Response:
        return await images_api.generate(service, request)

    async def complete(request: Request) -> Response:
        return await chat_api.complete(service, request)

    async def models(request: Request) -> Response:
        model = service.model
        own = {"id": model.name, "object": "model", "created": model.created, "owned_by": "lattejax"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [own]})
        service.check_model(request.path_params["name"])
        return JSONResponse(own)

    async def health(request: Request) -> Response:
        if not service.engine.is_running:
            raise ApiError(503, "the server is stopping, or has failed", code="unavailable")
        counts = service.engine.counts()
        return JSONResponse({"status": "ok", "running": counts.running, "waiting": counts.waiting})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def card(request: Request) -> Response:
        return JSONResponse(service.model.card)

    async def file(name: str, request: Request) -> Response:
        return FileResponse(PAGE / name, headers=HEADERS)

    routes = [
        Route("/v1/images/generations", generate, methods=["POST"]),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/card", card),
        *[Route(path, functools.partial(file, name)) for path, name in FILES.items()],
    ]
    handlers = {kind: errors.respond for kind in (HTTPException, ApiError, Exception)}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Front(app, service.metrics, api_key, local_host, service.limits.client_seconds)
