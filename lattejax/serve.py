"""Serves a run: an OpenAI-compatible API, and a page to draw and ask at http://127.0.0.1:8000:

python -m lattejax.serve --workdir=runs/digits

Only this machine reaches it. Another --host needs --api_key, which may also be the environment's LATTEJAX_API_KEY, or
--open. SIGTERM or Ctrl-C: it takes no more requests, completes those that it has, and exits.
"""

import dataclasses
import os
from typing import Annotated

from absl import flags

from lattejax import cli
from lattejax.errors import UserError, require
from lattejax.ranges import Range, ranges
from lattejax.runs.run import Run
from lattejax.serving.limits import Limits, Seconds
from lattejax.weights.autoencoders import StoredAutoencoder
from lattejax.weights.hugging_face import name_of

WORKDIR = cli.define_path("workdir", None, "A run's directory, an export, or hf://owner/name.")
AUTOENCODER = cli.define_path("autoencoder", None, "The run's autoencoder, if it has moved.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "The address to listen at.")
PORT = cli.define_number("port", 8000, "The port; 0: any that is free.", Annotated[int, Range(0, 65_535)])
API_KEY = flags.DEFINE_string("api_key", None, "The key that clients must send.")
OPEN = flags.DEFINE_bool("open", False, "Let anybody in who reaches the address.")
MODEL_NAME = flags.DEFINE_string("model_name", None, "The model's name for clients; default: the end of --workdir.")
GRACE = cli.define_number("grace_seconds", 30, "How long requests may take to complete when it stops.", Seconds)

TEXTS = {
    "images_per_request": "Pictures that one request may ask for.",
    "steps": "Sampling steps that one request may ask for.",
    "prompt_tokens": "Tokens of a drawing's prompt, with the template's; default: by the run's data.prompt_length.",
    "context_tokens": "Tokens of a conversation, with its answer; default: 512 to 4,096, by the run's data.",
    "conversations": "Conversations whose turns are kept, and answers that are decoded together.",
    "batch_size": "Guided pictures that share a step; without guidance twice as many do.",
    "pictures": "Pictures in flight.",
    "body_bytes": "Bytes of a request.",
    "image_pixels": "Pixels of an image that is sent.",
    "request_pixels": "Pixels of all images of a request; at least those of one.",
    "queue": "Requests that wait; more are refused with 429.",
    "queue_seconds": "How long a request may wait.",
    "client_seconds": "How long a client may take to send its request, or to read a part of the response.",
}
BY_THE_RUN = ("prompt_tokens", "context_tokens")


def define_limits() -> dict[str, flags.FlagHolder]:
    """A flag for each limit."""
    defined = {}
    for field in dataclasses.fields(Limits):
        default = None if field.name in BY_THE_RUN else field.default
        kind, allowed = ranges(Limits)[field.name]
        defined[field.name] = cli.define_number(field.name, default, TEXTS[field.name], Annotated[kind, allowed])
    return defined


LIMITS = define_limits()
flags.mark_flags_as_required(["workdir"])


def read_key() -> str:
    """The key that clients must send, or nothing."""
    key = os.environ.get("LATTEJAX_API_KEY") or None if API_KEY.value is None else API_KEY.value
    if key is None:
        return ""
    key = key.strip()  # such as the end of a file's line
    if not key:
        raise UserError("--api_key is empty; give a key, or leave the flag out")
    if not (key.isascii() and key.isprintable()):
        raise UserError("--api_key has characters that are not printable ASCII, which no header can carry")
    return key


def main() -> None:
    for package in ("starlette", "uvicorn", "prometheus_client"):
        require(package, "serve", "serving")
    from lattejax.serving import server  # which imports these packages

    api_key = read_key()
    if AUTOENCODER.value:
        StoredAutoencoder.open(AUTOENCODER.value)  # raises before anything else is read
    run = Run.open(WORKDIR.value)
    limits = server.default_limits(run.config, {name: flag.value for name, flag in LIMITS.items()})
    listening, is_local = server.Address(HOST.value, PORT.value, api_key, OPEN.value).listen()
    name = MODEL_NAME.value or name_of(WORKDIR.value) or run.workdir.path.name
    service, compile_all = server.make_service(run, name, limits, WORKDIR.value, AUTOENCODER.value or "")
    server.report(compile_all)
    listening.listen()
    host, port = listening.getsockname()[:2]
    print(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    server.serve(service, listening, HOST.value if is_local else None, api_key, GRACE.value)


if __name__ == "__main__":
    cli.run(main)
