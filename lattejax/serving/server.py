"""Starting, serving, and stopping."""

import asyncio
import contextlib
import dataclasses
import functools
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import uvicorn
from absl import logging
from PIL import Image

from lattejax.configuration import Config
from lattejax.errors import UserError
from lattejax.runs.run import Run
from lattejax.sampling.answers import Answerer
from lattejax.sampling.conversations import Conversations
from lattejax.sampling.images import ImageSampler
from lattejax.sampling.padding import padded_length
from lattejax.serving.app import make_app
from lattejax.serving.card import make_card
from lattejax.serving.chats import Chats
from lattejax.serving.connections import Connection
from lattejax.serving.drawing import Drawer
from lattejax.serving.drawings import Drawings
from lattejax.serving.engine import Engine
from lattejax.serving.front import is_loopback
from lattejax.serving.limits import Limits
from lattejax.serving.metrics import Metrics
from lattejax.serving.service import Model, Service

SECONDS_BETWEEN_CHECKS = 0.05
SECONDS_TO_SEND = 5  # the last responses, after the engine has ended
MOST_CONTEXT, LEAST_CONTEXT = 4096, 512  # tokens of a conversation, by default


@dataclasses.dataclass(frozen=True)
class Address:
    """Where to listen, and for whom."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    is_open: bool = False  # to anybody who reaches the address

    def listen(self) -> tuple[socket.socket, bool]:
        """Opens the socket; also returns whether only this machine reaches it.

        Raises:
          UserError: the address is unknown or in use, or open to others without a key.
        """
        what = f"--host={self.host} --port={self.port}"
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError) as error:
            raise UserError(f"{what}: there is no such address: {error}") from None
        is_local = is_loopback(address[0].partition("%")[0])
        if not (is_local or self.api_key or self.is_open):
            raise UserError(f"{what} is reached from other machines: give --api_key, or --open to let anybody in")
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
        except OSError as error:
            opened.close()
            raise UserError(f"{what}: cannot listen there: {error.strerror}") from None
        return opened, is_local


def default_limits(config: Config, given: dict[str, float | None]) -> Limits:
    """The limits that are given, and for the rest the defaults; prompts may have twice as many tokens as the run was
    trained on, conversations four times as many and an image of the largest size.

    Raises:
      UserError: they contradict each other.
    """
    data, block = config.data, (config.model.vision.patch_size * config.model.vision.spatial_merge_size) ** 2
    context = 4 * (data.prompt_length + data.answer_length) + data.max_pixels // block
    own = {
        "prompt_tokens": max(64, 2 * data.prompt_length),
        "context_tokens": min(MOST_CONTEXT, max(LEAST_CONTEXT, context)),
    }
    own |= {name: value for name, value in given.items() if value is not None}
    own["prompt_tokens"] = padded_length(own["prompt_tokens"])
    try:
        return Limits(**own)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def make_service(
    run: Run, name: str, limits: Limits, workdir: str, autoencoder: str = ""
) -> tuple[Service, Callable[..., None]]:
    """Opens a run's weights; returns the service, not started yet, and what compiles its programs. `workdir` is the
    run's directory as users write it."""
    sampler = ImageSampler.of(run, run.params(run.config.dtype), autoencoder)
    answerer = Answerer(sampler.config.vlm, sampler.vlm, run.encoder, run.generation.repetition_penalty)
    conversations = Conversations(answerer, limits.conversations, limits.context_tokens)
    contexts = 1 + 2 * limits.pictures
    drawer = Drawer(sampler, limits.pictures, contexts, limits.step_rows, limits.prompt_tokens)
    metrics = Metrics()
    engine = Engine(
        Drawings(drawer, contexts, metrics), Chats(conversations, metrics), limits.queue, limits.queue_seconds
    )
    rows, columns = sampler.config.generation.grid
    card = make_card(run, name, workdir, limits, autoencoder)
    if run.config.eval.sample_steps > limits.steps:
        logging.warning(
            "the run draws in %d steps; requests that do not say get %d, the most that --steps allows",
            run.config.eval.sample_steps,
            limits.steps,
        )
    model = Model(name, run.encoder, card, run.config.data.image_size, rows * columns, run.config.eval.sampling)

    def compile_all(done: Callable[[str], None]) -> None:
        drawer.compile(done)
        conversations.compile(done)

    return Service(model, engine, limits, metrics), compile_all


def report(compile_all: Callable[[Callable[[str], None]], None]) -> None:
    """Compiles, with a line that shows how far it is."""
    start, count, on_terminal = time.monotonic(), 0, sys.stdout.isatty()

    def done(what: str) -> None:
        nonlocal count
        count += 1
        if on_terminal:
            print(f"\r\033[Kcompiled {count} programs: {what}", end="", flush=True)

    compile_all(done)
    print("\r\033[K" * on_terminal + f"compiled {count} programs in {time.monotonic() - start:.0f} s", flush=True)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `serve` handles them


def serve(
    service: Service, listening: socket.socket, local_host: str | None, api_key: str, grace_seconds: float
) -> None:
    """Serves until SIGTERM or SIGINT; then completes what runs, for at most `grace_seconds`, and returns.

    Args:
      service: what answers.
      listening: the socket.
      local_host: see `Front`.
      api_key: the key that clients must send; empty: none.
      grace_seconds: see above.

    Raises:
      BaseException: what has ended the engine.
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # larger images than we allow are refused
    app = make_app(service, api_key, local_host)
    settings = uvicorn.Config(
        app,
        log_config=None,  # uvicorn's own would close the handlers of all loggers
        log_level="critical",
        access_log=False,
        lifespan="off",
        http=functools.partial(Connection, service.limits.client_seconds),
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=int(grace_seconds + SECONDS_TO_SEND),
    )
    server, engine = _Server(settings), service.engine
    stopping = threading.Thread(target=engine.stop, args=(grace_seconds,))

    def stop(*_: object) -> None:
        server.force_exit = server.should_exit  # the second time
        server.should_exit = True

    async def run() -> None:
        watching = asyncio.ensure_future(watch())
        await server.serve([listening])
        watching.cancel()

    async def watch() -> None:
        while not server.should_exit and engine.error is None:
            await asyncio.sleep(SECONDS_BETWEEN_CHECKS)
        server.should_exit = True
        stopping.start()

    engine.start()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    asyncio.run(run())
    if engine.error is not None:
        raise engine.error
    if stopping.is_alive() and not server.force_exit:
        stopping.join()
