"""A server with the tiny model's random weights, in a thread of the test's process."""

import base64
import contextlib
import functools
import io
import threading
from collections.abc import Iterator

import numpy as np
import uvicorn
from PIL import Image

from lattejax.flow.schedule import Sampling
from lattejax.sampling.answers import Answerer
from lattejax.sampling.conversations import Conversations
from lattejax.serving.app import make_app
from lattejax.serving.chats import Chats
from lattejax.serving.connections import Connection
from lattejax.serving.drawing import Drawer
from lattejax.serving.drawings import Drawings
from lattejax.serving.engine import Engine
from lattejax.serving.limits import Limits
from lattejax.serving.metrics import Metrics
from lattejax.serving.server import Address
from lattejax.serving.service import Model, Service
from tests.serving.test_engine import CONFIGS, ENCODER, sampler

USUAL = Sampling(7, 3.0, shift=0.8)  # what requests that do not say get
LIMITS = Limits(
    images_per_request=4,
    steps=300,
    prompt_tokens=64,
    context_tokens=128,
    conversations=2,
    batch_size=4,
    pictures=6,
    body_bytes=200_000,
    image_pixels=10_000,
    request_pixels=60_000,
    queue=4,
    queue_seconds=30,
    client_seconds=2,
)


def make_service(limits: Limits = LIMITS) -> Service:
    metrics = Metrics()
    drawer = Drawer(sampler(), limits.pictures, 9, limits.step_rows, limits.prompt_tokens)
    drawer.read(ENCODER.unconditional(), 0)
    answerer = Answerer(CONFIGS["couple"].model_config.vlm, sampler().vlm, ENCODER)
    conversations = Conversations(answerer, limits.conversations, limits.context_tokens, (32,))
    engine = Engine(Drawings(drawer, 9, metrics), Chats(conversations, metrics), limits.queue, limits.queue_seconds)
    card = {
        "name": "tiny",
        "groups": [{"layers": [1, 2], "interval": [0, 0.5]}, {"layers": [3, 4], "interval": [0.5, 1]}],
        "sampling": {"steps": USUAL.num_steps, "guidance": USUAL.guidance, "shift": USUAL.shift},
    }
    return Service(Model("tiny", ENCODER, card, 8, 16, USUAL), engine, limits, metrics)


@contextlib.contextmanager
def serving(service: Service, api_key: str = "") -> Iterator[str]:
    """Serves in a thread; yields the URL."""
    opened, _ = Address(port=0).listen()
    app, http = make_app(service, api_key), functools.partial(Connection, service.limits.client_seconds)
    settings = uvicorn.Config(app, http=http, log_config=None, log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(settings)
    opened.listen()
    service.engine.start()
    thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    finally:
        server.should_exit = True
        service.engine.stop(0)
        thread.join(20)


def pixels(b64_json: str) -> np.ndarray:
    """The pixels of a picture in a response."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB"))


def data_uri(image: Image.Image, form: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, format=form)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"
