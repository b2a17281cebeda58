"""64 clients of both kinds for two minutes, bad ones among them."""

import dataclasses
import json
import random
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from lattejax.flow.schedule import Sampling
from tests.serving.serving import LIMITS, data_uri, make_service, pixels, serving
from tests.serving.test_api import CHAT, IMAGES, JSON, PICTURES, answered, asking, drawn, raw, send

CLIENTS, SECONDS = 64, 120
DRAWINGS = [
    ("a handwritten seven", Sampling(8), 0),
    ("a handwritten two", Sampling(5, 1.0), 3),
    ("a three", Sampling(6, 3.0, solver="heun"), 7),
    ("a four", Sampling(9, shift=0.4), 2**31),
]
CHATS = [("Is this a seven?", None), ("Which digit is this?", PICTURES[0]), ("Is it even?", PICTURES[1])]
MOST_GROWTH = 40e6  # bytes after the first minute


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class Clients:
    """What clients send, and what they must get."""

    def __init__(self, url: str):
        self.url, self.counts, self.wrong = url, Counter(), []
        self.pictures = [drawn(sampling, 2, seed, text) for text, sampling, seed in DRAWINGS]
        self.answers = [
            answered([("user", (*([] if image is None else [image]), text))], max_tokens=6) for text, image in CHATS
        ]
        cut = data_uri(Image.new("RGB", (50, 50), "red"), "jpeg")[:-200]
        image = {"type": "image_url", "image_url": {"url": cut}}
        self.bad = {
            "oversized": (IMAGES, b'{"prompt": "' + b"a" * 300_000 + b'"}', 413),
            "truncated JPEG": (CHAT, json.dumps({"messages": [{"role": "user", "content": [image]}]}).encode(), 400),
            "wrong JSON": (CHAT, b'{"messages": [', 400),
            "wrong types": (CHAT, b'{"messages": "hi", "stream": 1}', 400),
            "huge n": (IMAGES, b'{"prompt": "a", "n": 1000000000}', 400),
        }

    def check(self, what: str, is_right: bool, found: object) -> None:
        self.counts[what] += 1
        if not is_right:
            self.wrong.append((what, str(found)[:300]))

    def draw(self, chance: random.Random) -> None:
        which, is_streamed = chance.randrange(len(DRAWINGS)), chance.random() < 0.5
        text, sampling, seed = DRAWINGS[which]
        body = {
            "prompt": text,
            "n": 2,
            "seed": seed,
            "num_inference_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance,
            "shift": sampling.shift,
            "solver": sampling.solver,
            "stream": is_streamed,
        }
        status, answer, _ = send(self.url, "POST", IMAGES, json.dumps(body).encode(), JSON)
        if status != 200:
            return self.check("draw", False, answer)
        data = answer["data"] if not is_streamed else of_events(answer)
        found = np.stack([pixels(one["b64_json"]) for one in sorted(data, key=lambda one: one.get("index", 0))])
        self.check("draw", np.abs(found.astype(int) - self.pictures[which]).max() <= 1, which)

    def chat(self, chance: random.Random) -> None:
        which = chance.randrange(len(CHATS))
        text, image = CHATS[which]
        body = {"messages": [asking(text, *([] if image is None else [image]))], "max_tokens": 6}
        status, answer, _ = send(self.url, "POST", CHAT, json.dumps(body).encode(), JSON)
        found = answer["choices"][0]["message"]["content"] if status == 200 else answer
        self.check("chat", found == self.answers[which], found)

    def misbehave(self, chance: random.Random) -> None:
        what = chance.choice([*self.bad, "gone", "slow"])
        if what in self.bad:
            path, body, expected = self.bad[what]
            status, answer, _ = send(self.url, "POST", path, body, JSON)
            return self.check(what, status == expected and "message" in answer["error"], (status, answer))
        body = {"prompt": "a", "n": 4, "num_inference_steps": 300, "stream": True, "progress": True}
        own = raw(self.url, IMAGES, json.dumps(body).encode())
        start = own.recv(300)
        if what == "slow":
            time.sleep(chance.random() * 3)
        own.close()
        self.check(what, start.startswith(b"HTTP/1.1 200"), start)


def of_events(text: str) -> list[dict]:
    found = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    return [one for one in found if one["type"] == "image_generation.completed"]


@pytest.mark.slow
def test_good_requests_are_answered_rightly_and_bad_ones_get_their_error(capfd):
    service = make_service(dataclasses.replace(LIMITS, queue=500, queue_seconds=100, conversations=8))
    service.engine._chats._conversations.compile()
    service.engine._drawings._drawer.compile()
    with serving(service) as url:
        clients, end = Clients(url), time.monotonic() + SECONDS
        capfd.readouterr()

        def run(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < end:
                kind = chance.choices([clients.draw, clients.chat, clients.misbehave], [4, 4, 2])[0]
                try:
                    kind(chance)
                except Exception as error:
                    clients.check("a client's error", False, repr(error))

        threads = [threading.Thread(target=run, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS / 2)
        halfway = resident_bytes()
        for thread in threads:
            thread.join()
        grown = resident_bytes() - halfway
        while (counts := service.engine.counts()).running or counts.waiting:
            time.sleep(0.1)
        assert send(url, "GET", "/health", None)[0] == 200
        time.sleep(1)
    out, err = capfd.readouterr()
    print(dict(clients.counts), f"grown by {grown / 1e6:.1f} MB")
    assert not clients.wrong, (len(clients.wrong), clients.wrong[:3])
    assert clients.counts["draw"] > 20 and clients.counts["chat"] > 20 and len(clients.counts) == 9
    assert grown < MOST_GROWTH
    assert err == "" and len(out.splitlines()) == sum(clients.counts.values()) + 1, err[-2000:]
