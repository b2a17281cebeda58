"""The speed of a server under load: latencies where requests come at random, and pictures a second where clients wait.

Requests of the open loop come at times drawn in advance, whether or not earlier ones are answered; a latency counts
from that time. In the closed loop each client sends its next request once it has its picture.
"""

import dataclasses
import http.client
import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from lattejax.benchmarks.measuring import Result
from lattejax.errors import UserError
from lattejax.files import parse_json
from lattejax.flow.schedule import Sampling
from lattejax.sampling.images import ImageSampler

ENDPOINTS = {"image": "/v1/images/generations", "chat": "/v1/chat/completions"}
TIMEOUT = 300  # seconds
QUESTION = "What is this?"


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of a server."""

    url: str
    key: str  # of its API; empty: none
    rate: float  # requests a second in the open loop
    clients: int  # in the closed loop
    seconds: float  # of each loop
    steps: int
    guidance: float
    new_tokens: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Answered:
    """One request; times are in seconds from when it was due."""

    kind: str
    status: int  # 0: no answer
    first: float  # until the first preview or token
    latency: float
    tokens: int


class Client:
    """Sends requests of one load."""

    def __init__(self, load: Load):
        wrong = UserError(f"--url={load.url} must be that of a server, like http://127.0.0.1:8000")
        try:
            parts = urlsplit(load.url)
        except ValueError:
            raise wrong from None
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise wrong
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        self._connect = lambda: kinds[parts.scheme](parts.netloc, timeout=TIMEOUT)
        self._load = load
        self._headers = {"Content-Type": "application/json"}
        if load.key:
            self._headers["Authorization"] = f"Bearer {load.key}"
        self.card = self._read_card()

    def _read_card(self) -> dict[str, Any]:
        try:
            connection = self._connect()
            connection.request("GET", "/card", headers=self._headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"--url={self._load.url}: no server answers: {error}") from None
        if response.status != 200:
            said = body[:200].decode(errors="replace")
            raise UserError(f"--url={self._load.url}: the server answers {response.status}: {said}")
        card = parse_json(body.decode(errors="replace"), f"--url={self._load.url}: its /card")
        if "prompts" not in card:
            raise UserError(f"--url={self._load.url} is another server: its /card has no prompts")
        return card

    def body(self, kind: str, index: int) -> dict[str, Any]:
        load, prompts = self._load, self.card["prompts"]
        if kind == "chat":
            messages = [{"role": "user", "content": f"{QUESTION} ({index})"}]
            return {"messages": messages, "max_tokens": load.new_tokens, "stream": True}
        settings = {"num_inference_steps": load.steps, "guidance_scale": load.guidance, "seed": index}
        return {"prompt": prompts[index % len(prompts)], "stream": True, "partial_images": 3, **settings}

    def send(self, kind: str, index: int, due: float) -> Answered:
        """Sends one request and reads its stream to the end."""
        first, tokens, status = math.nan, 0, 0
        connection = self._connect()
        try:
            connection.request("POST", ENDPOINTS[kind], json.dumps(self.body(kind, index)), self._headers)
            response = connection.getresponse()
            status = response.status
            for values in events(response) if status == 200 else ():
                if "error" in values:
                    status = 0
                if is_first(kind, values):
                    first = time.perf_counter() - due if math.isnan(first) else first
                    tokens += 1
        except (OSError, http.client.HTTPException):
            status = 0
        finally:
            connection.close()
        return Answered(kind, status, first, time.perf_counter() - due, tokens)


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The data of server-sent events."""
    for line in response:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line.removeprefix(b"data: "))


def is_first(kind: str, values: dict[str, Any]) -> bool:
    """Whether an event brings a picture, a preview of one, or a token."""
    if kind == "image":
        return "b64_json" in values
    return any(choice["delta"].get("content") for choice in values.get("choices", ()))


def arrivals(rate: float, seconds: float, seed: int) -> list[tuple[float, str]]:
    """When requests of each kind come: a Poisson process, of which half are drawings."""
    chance, now, found = random.Random(seed), 0.0, []
    while (now := now + chance.expovariate(rate)) < seconds:
        found.append((now, chance.choice(list(ENDPOINTS))))
    return found


def open_loop(client: Client, load: Load) -> list[Answered]:
    """Sends every request when it is due."""
    answered: list[Answered] = []
    start, threads = time.perf_counter(), []
    for index, (due, kind) in enumerate(arrivals(load.rate, load.seconds, load.seed)):
        time.sleep(max(0.0, start + due - time.perf_counter()))
        send = _keeping(answered, lambda kind=kind, index=index, due=due: client.send(kind, index, start + due))
        threads.append(threading.Thread(target=send))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return answered


def _keeping(answered: list[Answered], send: Callable[[], Answered]) -> Callable[[], None]:
    return lambda: answered.append(send())


def closed_loop(client: Client, load: Load, seconds: float) -> float:
    """Pictures a second of clients that each wait for theirs."""
    start = time.perf_counter()
    answered: list[Answered] = []

    def draw(number: int) -> None:
        index = number
        while time.perf_counter() < start + seconds:
            answered.append(client.send("image", index, time.perf_counter()))
            index += load.clients

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(load.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [one.status for one in answered if one.status != 200]
    if failed:
        raise UserError(f"{len(failed)} of {len(answered)} requests failed, with status {failed[0]}; fewer --clients?")
    return len(answered) / (time.perf_counter() - start)


def percentiles(name: str, values: Sequence[float]) -> Result:
    values = [value for value in values if not math.isnan(value)]
    return {f"{name}_p{share}": float(np.percentile(values, share)) for share in (50, 90, 99)} if values else {}


def serve(load: Load, against: str, batch_size: int, repeats: int) -> Result:
    """Figures of a server; against `sample`, the closed loop alternates with batches drawn in this process."""
    client = Client(load)
    answered = open_loop(client, load)
    good = [one for one in answered if one.status == 200]
    result: Result = {"requests": len(answered), "refused_or_failed": len(answered) - len(good)}
    for kind, first in (("image", "first_picture"), ("chat", "first_token")):
        own = [one for one in good if one.kind == kind]
        result |= percentiles(f"{kind}_seconds", [one.latency for one in own])
        result |= percentiles(f"{first}_seconds", [one.first for one in own])
    result["tokens_per_second"] = sum(one.tokens for one in good if one.kind == "chat") / load.seconds
    if not against:
        return result | {"pictures_per_second": closed_loop(client, load, load.seconds)}
    sampler = ImageSampler.load(client.card["workdir"])
    prompts = [sampler.encoder.drawing(prompt) for prompt in client.card["prompts"]][:batch_size]
    sampling = Sampling(load.steps, load.guidance)
    count = -(-batch_size // len(prompts))
    ours, theirs = [], []
    for repeat in range(1 + repeats):
        start = time.perf_counter()
        images = sampler(prompts, sampling, images_per_prompt=count, batch_size=batch_size, seed=repeat)
        theirs.append(len(images) / (time.perf_counter() - start))
        ours.append(closed_loop(client, load, load.seconds / repeats))
    figures = {"pictures_per_second": float(np.median(ours[1:])), "against_per_second": float(np.median(theirs[1:]))}
    return result | figures | {"ratio": figures["pictures_per_second"] / figures["against_per_second"]}
