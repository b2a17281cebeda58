"""What the endpoints share: the model, its engine, and how jobs are submitted and listened to."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from starlette.requests import Request

from lattejax.data.prompts import PromptEncoder
from lattejax.errors import UserError
from lattejax.flow.schedule import Sampling
from lattejax.serving.engine import LATE, STOPPING, Engine, Full, Stopping
from lattejax.serving.errors import ApiError, ClientGone
from lattejax.serving.jobs import Done, Failed, Job
from lattejax.serving.limits import Limits
from lattejax.serving.metrics import Metrics

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Model:
    """What is served."""

    name: str
    encoder: PromptEncoder
    card: dict[str, Any]
    image_size: int
    image_tokens: int  # of a picture
    sampling: Sampling  # where a request does not say
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


class Service:
    """One model, its engine and its limits."""

    def __init__(self, model: Model, engine: Engine, limits: Limits, metrics: Metrics):
        self.model, self.engine, self.limits, self.metrics = model, engine, limits, metrics
        # Decoding an image would stop the event loop. One thread, in the order of the requests.
        self._preparing = concurrent.futures.ThreadPoolExecutor(1, "prepare")
        self._developing = concurrent.futures.ThreadPoolExecutor(2, "develop")
        self._in_preparation = 0
        metrics.watch(lambda: engine.counts().running, lambda: engine.counts().waiting)

    async def prepare(self, request: Request, function: Callable[..., Result], *arguments: Any) -> Result:
        """Calls what reads a request's texts and images, in a thread. From now on the request waits.

        Raises:
          ApiError: as many as the queue may hold are being prepared already, or the request is refused.
        """
        if self._in_preparation >= self.limits.queue:
            raise queue_full(Full(1))
        self._in_preparation += 1
        request.state.waits_since = time.monotonic()
        try:
            async with asyncio.timeout(self.limits.queue_seconds):
                return await asyncio.get_running_loop().run_in_executor(self._preparing, function, *arguments)
        except TimeoutError:
            raise failure(Failed(LATE)) from None
        except UserError as error:
            raise ApiError(400, str(error)) from None
        finally:
            self._in_preparation -= 1

    async def develop(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Calls what waits for pixels and encodes them, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._developing, function, *arguments)

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` if another model is wanted."""
        if name not in (None, self.model.name):
            text = f"there is no model {name!r:.100}; this server has {self.model.name}"
            raise ApiError(404, text, "model", "model_not_found")

    def submit(self, request: Request, make: Callable[[Callable[[Any], None]], Job]) -> "Listener":
        """Queues the job that `make` makes of a request that has been prepared.

        Raises:
          ApiError: the queue is full, or the server is stopping.
        """
        listener = Listener(request)
        listener.job = make(listener.tell)
        listener.job.submitted = request.state.waits_since
        try:
            self.engine.submit(listener.job)
        except Full as full:
            raise queue_full(full) from None
        except Stopping:
            raise failure(Failed(STOPPING)) from None
        return listener


class Listener:
    """A job's events, in the event loop of its request."""

    job: Job

    def __init__(self, request: Request):
        self._request, self._loop = request, asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()  # of at most as many events as the job has

    def tell(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def events(self) -> AsyncIterator[Any]:
        """Yields the job's events up to `Done`; the job is cancelled if nobody listens any more.

        Raises:
          ApiError: the job has failed.
          ClientGone: the client has closed the connection.
        """
        gone, event = asyncio.ensure_future(self._gone()), None
        try:
            while True:
                event = asyncio.ensure_future(self._queue.get())
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    raise ClientGone
                if isinstance(event.result(), Failed):
                    raise failure(event.result())
                yield event.result()
                if isinstance(event.result(), Done):
                    return
        except (ClientGone, asyncio.CancelledError):
            self._request.state.is_gone = True  # for the log, though the response has begun
            raise
        finally:
            gone.cancel()
            if event is not None:
                event.cancel()
            self.job.cancel()

    async def _gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


def queue_full(full: Full) -> ApiError:
    return ApiError(429, str(full), code="queue_full", retry_after=full.seconds)


def failure(failed: Failed) -> ApiError:
    """The error of a job that has failed."""
    if failed.is_refusal:
        return ApiError(400, failed.reason)
    if failed.reason == LATE:
        return ApiError(503, "the request has waited too long; try again", code="queue_timeout", retry_after=5)
    if failed.reason == STOPPING:
        return ApiError(503, "the server is stopping", code="server_stopping", retry_after=10)
    return ApiError(500, "the server has failed; its log says why", code="internal_error")


def now() -> int:
    return math.floor(time.time())
