"""The API, driven by OpenAI's client, against what the library computes; and its errors."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import http.client
import json
import re
import socket
import threading
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import jax
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image
from starlette.requests import Request

from lattejax.data import digits
from lattejax.data.prompts import Turn
from lattejax.flow.schedule import Sampling
from lattejax.models import qwen2_vl
from lattejax.sampling.answers import Answerer, Decoding
from lattejax.serving import chat_fields, images_api, pictures
from lattejax.serving.connections import Connection
from lattejax.serving.errors import ApiError
from lattejax.serving.fields import Fields
from lattejax.serving.front import Front
from lattejax.serving.metrics import Metrics
from lattejax.serving.service import Listener
from tests.serving.serving import LIMITS, USUAL, data_uri, make_service, pixels, serving
from tests.serving.test_engine import CONFIGS, ENCODER, sampler

SEVEN = "a handwritten seven"
PICTURES = [Image.fromarray(image) for image in digits.load("test").images[:2]]


@pytest.fixture(scope="module")
def service():
    return make_service()


@pytest.fixture(scope="module")
def url(service):
    with serving(service) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def drawn(sampling, count=1, seed=0, text=SEVEN, negative=()):
    negative = [ENCODER.drawing(each) for each in negative]
    one = dict(images_per_prompt=count, batch_size=count, seed=seed, negative=negative)
    return sampler()([ENCODER.drawing(text)], sampling, **one).astype(int)


def answered(turns, **decoding):
    answerer = Answerer(CONFIGS["couple"].model_config.vlm, sampler().vlm, ENCODER)
    turns = [
        Turn(role, tuple(ENCODER.read_image(p) if isinstance(p, Image.Image) else p for p in c)) for role, c in turns
    ]
    return "".join(answerer.stream(ENCODER.chat(turns), Decoding(**decoding)))


def asking(text, *images):
    parts = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


# ---- Images


def test_images_are_those_of_sample_with_every_field(client):
    extra = dict(num_inference_steps=4, guidance_scale=3, seed=5, shift=0.5, solver="heun", negative_prompt="a two")
    done = client.images.generate(
        model="tiny", prompt=SEVEN, n=3, size="8x8", response_format="b64_json", quality="high", extra_body=extra
    )
    expected = drawn(Sampling(4, 3.0, solver="heun", shift=0.5), 3, 5, negative=["a two"])
    assert np.abs(np.stack([pixels(one.b64_json) for one in done.data]) - expected).max() <= 1
    assert (done.size, done.output_format, done.created > 1e9) == ("8x8", "png", True)
    assert done.usage.output_tokens == 3 * 16 and done.usage.input_tokens == len(ENCODER.drawing(SEVEN).input_ids)
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    assert done.usage.input_tokens_details.text_tokens == done.usage.input_tokens


def test_flow_shift_is_that_of_other_servers_the_inverse_of_ours(client):
    extra = dict(num_inference_steps=4, guidance_scale=1, seed=1, flow_shift=2)
    done = client.images.generate(prompt=SEVEN, extra_body=extra)
    expected = drawn(Sampling(4, 1.0, shift=0.5), 1, 1)
    assert np.abs(pixels(done.data[0].b64_json) - expected[0]).max() <= 1


@pytest.mark.parametrize("form, quality", [("webp", 100), ("webp", 50), ("jpeg", 95)])
def test_pictures_come_in_the_format_that_is_asked_for(client, form, quality):
    done = client.images.generate(prompt=SEVEN, output_format=form, output_compression=quality, extra_body={"seed": 2})
    head = base64.b64decode(done.data[0].b64_json)[:12]
    assert head.startswith(b"\xff\xd8") if form == "jpeg" else head[8:] == b"WEBP"
    if quality == 100:
        assert np.abs(pixels(done.data[0].b64_json) - drawn(USUAL, seed=2)[0]).max() <= 1


def test_without_a_seed_pictures_differ_and_the_seed_is_told(client):
    first, second = (client.images.generate(prompt=SEVEN, extra_body={"num_inference_steps": 2}) for _ in range(2))
    assert first.seed != second.seed
    again = client.images.generate(prompt=SEVEN, extra_body={"num_inference_steps": 2, "seed": second.seed})
    np.testing.assert_array_equal(pixels(again.data[0].b64_json), pixels(second.data[0].b64_json))


def test_a_stream_has_previews_at_the_edges_and_then_the_pictures(client):
    extra = dict(num_inference_steps=6, seed=3)
    events = list(client.images.generate(prompt=SEVEN, n=2, stream=True, partial_images=2, extra_body=extra))
    kinds = [one.type.removeprefix("image_generation.") for one in events]
    assert kinds == ["partial_image"] * 2 + ["completed"] * 2, "two groups have one edge"
    assert {one.partial_image_index for one in events[:2]} == {0} and {one.index for one in events[:2]} == {0, 1}
    found = {one.index: pixels(one.b64_json) for one in events[2:]}
    assert np.abs(np.stack([found[0], found[1]]) - drawn(dataclasses.replace(USUAL, num_steps=6), 2, 3)).max() <= 1
    assert events[2].usage.output_tokens == 32 and events[2].size == "8x8" and events[0].background == "opaque"


def test_progress_names_the_group_of_each_step(client):
    extra = dict(num_inference_steps=4, shift=1, progress=True)
    events = list(client.images.generate(prompt=SEVEN, stream=True, extra_body=extra))
    steps = [(one.group, one.step, one.steps) for one in events if one.type == "image_generation.progress"]
    assert steps == [(0, 1, 4), (0, 2, 4), (1, 3, 4), (1, 4, 4)]


# ---- Chat


def test_a_conversation_of_several_turns_with_images(client):
    turns, messages = [("system", ("Speak.",))], [{"role": "system", "content": "Speak."}]
    cached = []
    for number, picture in enumerate([PICTURES[0], None]):
        shown = () if picture is None else (picture,)
        turns.append(("user", (*shown, f"Which digit is it, {number}?")))
        messages.append(asking(f"Which digit is it, {number}?", *shown))
        done = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=5)
        expected = answered(turns, max_tokens=5)
        assert done.choices[0].message.content == expected
        assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
        cached.append(done.usage.prompt_tokens_details.cached_tokens)
        turns.append(("assistant", (expected,)))
        messages.append(done.choices[0].message.model_dump())
    assert cached[1] >= done.usage.prompt_tokens - 30 > 20, "only the second turn is read"


@pytest.mark.parametrize("settings", [{}, dict(temperature=1.5, top_p=0.9, seed=4)])
def test_a_stream_is_the_answer_in_pieces(client, settings):
    options = dict(model="tiny", messages=[asking("Is this a three?")], max_tokens=8, **settings)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == answered([("user", ("Is this a three?",))], max_tokens=8, **settings)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens <= 8
    assert len({chunk.id for chunk in chunks}) == 1 and len([piece for piece in pieces if piece]) > 1


def test_an_answer_ends_before_a_stop_string(client):
    messages = [asking("Is this a three?")]
    complete = client.chat.completions.create(messages=messages, max_tokens=12, model="tiny").choices[0]
    text = complete.message.content
    stop = text[len(text) // 2 :][:2]
    for settings in (dict(stop=stop), dict(stop=["never so", stop])):
        done = client.chat.completions.create(messages=messages, max_tokens=12, model="tiny", **settings)
        assert done.choices[0].message.content == text.partition(stop)[0]
        assert done.choices[0].finish_reason == "stop"
        assert done.usage.prompt_tokens_details.cached_tokens == done.usage.prompt_tokens - 1
        chunks = client.chat.completions.create(messages=messages, max_tokens=12, model="tiny", stream=True, **settings)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text.partition(stop)[0]


def test_log_probabilities(client):
    messages = [asking("Is this a three?")]
    settings = dict(messages=messages, max_tokens=3, model="tiny", logprobs=True, top_logprobs=2)
    done = client.chat.completions.create(**settings).choices[0]
    prompt = ENCODER.question("Is this a three?")
    batch = jax.tree.map(jax.numpy.asarray, ENCODER.batch([prompt]))
    hidden, _ = jax.jit(qwen2_vl.forward, static_argnames="config")(sampler().config.vlm, sampler().vlm, batch)
    logits = qwen2_vl.logits(sampler().config.vlm, sampler().vlm, hidden)[0, -1]
    expected = np.sort(jax.nn.log_softmax(logits))[::-1]
    first = done.logprobs.content[0]
    assert first.logprob == pytest.approx(expected[0], abs=1e-4)
    assert [one.logprob for one in first.top_logprobs] == pytest.approx(expected[:2].tolist(), abs=1e-4)
    assert first.top_logprobs[0].token == first.token and len(done.logprobs.content) == 3
    assert b"".join(bytes(one.bytes) for one in done.logprobs.content).decode(errors="replace") == done.message.content
    chunks = list(client.chat.completions.create(stream=True, **settings))
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [one.logprob for one in streamed] == [one.logprob for one in done.logprobs.content]


# ---- The rest


def test_models_health_and_metrics(client, url, service, monkeypatch):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lattejax"
    with pytest.raises(openai.NotFoundError, match="there is no model 'large'"):
        client.models.retrieve("large")
    with monkeypatch.context() as patched:
        patched.setattr(service, "model", dataclasses.replace(service.model, name="owner/name"))
        assert get(url, "/v1/models/owner/name")[0] == 200
    assert get(url, "/health") == (200, {"status": "ok", "running": 0, "waiting": 0})
    client.images.generate(prompt=SEVEN, extra_body={"num_inference_steps": 1})
    status, text = get(url, "/metrics")
    assert status == 200
    for name in ("requests_running 0.0", 'requests_total{endpoint="images",status="200"}', "first_seconds_bucket"):
        assert f"lattejax_{name}" in text, name


def get(url, path, headers=None):
    return send(url, "GET", path, None, headers)[:2]


def send(url, method, path, body, headers=None):
    """Status, body and headers of a response, with a client that refuses nothing."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    is_json = response.headers["content-type"].startswith("application/json")
    return response.status, json.loads(text) if is_json else text, response.headers


JSON = {"Content-Type": "application/json"}
IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}


def image_part(url):
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


TEXT = {"type": "text", "text": "a"}


def parts(count, part=TEXT):
    return {"messages": [{"role": "user", "content": [part] * count}]}


CUT = data_uri(Image.new("RGB", (50, 50), "red"), "jpeg")
WHITE = {"type": "image_url", "image_url": {"url": data_uri(Image.new("1", (50, 50), 1))}}
BAD = {
    "no JSON": (IMAGES, b"{", 400, None, "is no JSON"),
    "no object": (IMAGES, [1], 400, None, "must be an object"),
    "NaN": (IMAGES, b'{"prompt": NaN}', 400, None, "NaN is no number"),
    "nested deeply": (IMAGES, b"[" * 10_000, 400, None, "is no JSON"),
    "a number of many digits": (IMAGES, b'{"n": ' + b"9" * 5000 + b"}", 400, None, "is no JSON"),
    "no UTF-8": (IMAGES, b'{"prompt": "\xff"}', 400, None, "is no JSON"),
    "half a character": (IMAGES, rb'{"prompt": "\ud800"}', 400, None, "is no Unicode"),
    "no prompt": (IMAGES, {}, 400, "prompt", "prompt is missing"),
    "empty prompt": (IMAGES, {"prompt": " "}, 400, None, "prompt is empty"),
    "prompt of another type": (IMAGES, {"prompt": 5}, 400, "prompt", "must be a string, not 5"),
    "huge guidance": (IMAGES, {"prompt": "a", "guidance_scale": 10**400}, 400, "guidance_scale", "from 0 to 20"),
    "huge seed": (IMAGES, {"prompt": "a", "seed": 10**400}, 400, "seed", "from 0 to"),
    "half a character as a name": (IMAGES, rb'{"prompt": "a", "\ud800": 1}', 400, r"\ud800", r"unknown field '\ud800'"),
    "long prompt": (IMAGES, {"prompt": "a " * 5000}, 400, "prompt", "characters"),
    "prompt of many tokens": (IMAGES, {"prompt": "seven " * 100}, 400, "prompt", "at most 64 can be drawn"),
    "negative prompt of many tokens": (
        IMAGES,
        {"prompt": "a", "negative_prompt": "seven " * 100},
        400,
        "negative_prompt",
        "at most 64 can be drawn",
    ),
    "huge n": (IMAGES, {"prompt": "a", "n": 10**9}, 400, "n", "from 1 to 4"),
    "n of another type": (IMAGES, {"prompt": "a", "n": True}, 400, "n", "must be an integer"),
    "many steps": (IMAGES, {"prompt": "a", "num_inference_steps": 301}, 400, "num_inference_steps", "from 1 to 300"),
    "another size": (IMAGES, {"prompt": "a", "size": "256x256"}, 400, "size", "one of auto, 8x8"),
    "a URL": (IMAGES, {"prompt": "a", "response_format": "url"}, 400, "response_format", "one of b64_json"),
    "guidance": (IMAGES, {"prompt": "a", "guidance_scale": -1}, 400, "guidance_scale", "from 0 to 20"),
    "two shifts": (IMAGES, {"prompt": "a", "shift": 1, "flow_shift": 1}, 400, "shift", "give one"),
    "interval": (IMAGES, {"prompt": "a", "guidance_interval": [1, 0]}, 400, "guidance_interval", "increasing"),
    "huge interval": (IMAGES, {"prompt": "a", "guidance_interval": [0, 10**400]}, 400, "guidance_interval", "refused"),
    "solver": (IMAGES, {"prompt": "a", "solver": "rk4"}, 400, "solver", "one of euler, heun"),
    "previews alone": (IMAGES, {"prompt": "a", "partial_images": 1}, 400, "partial_images", "needs stream"),
    "unknown field": (IMAGES, {"prompt": "a", "stepz": 5}, 400, "stepz", "unknown field 'stepz'"),
    "another model": (IMAGES, {"prompt": "a", "model": "dall-e"}, 404, "model", "there is no model"),
    "large body": (IMAGES, {"prompt": "a", "user": "x" * 200_000}, 413, None, "larger than 200,000 bytes"),
    "no messages": (CHAT, {"messages": []}, 400, "messages", "must end with a message of the user"),
    "no user": (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages", "of the user"),
    "no role": (CHAT, {"messages": [{"content": "a"}]}, 400, "messages.0.role", "is missing"),
    "role": (CHAT, {"messages": [{"role": "king", "content": "a"}]}, 400, "messages.0.role", "one of system"),
    "no content": (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content", "is missing"),
    "part": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        400,
        "messages.0.content.0.type",
        "text",
    ),
    "remote image": (CHAT, image_part("http://127.0.0.1/x"), 400, "messages.0.content.0.image_url.url", "not fetched"),
    "no base64": (CHAT, image_part("data:image/png;base64,!"), 400, "messages.0.content.0.image_url.url", "base64"),
    "no image": (CHAT, image_part("data:image/png;base64,aGk="), 400, "messages.0.content.0.image_url.url", "read"),
    "truncated JPEG": (CHAT, image_part(CUT[:-200]), 400, "messages.0.content.0.image_url.url", "cannot be read"),
    "bomb": (
        CHAT,
        image_part(data_uri(Image.new("1", (9000, 9000)))),
        413,
        "messages.0.content.0.image_url.url",
        "pixels",
    ),
    "seven large images": (
        CHAT,
        parts(7, {"type": "image_url", "image_url": {"url": data_uri(Image.new("1", (100, 90)))}}),
        413,
        "messages.0.content.6.image_url.url",
        "the images have 63,000 pixels; at most 60,000",
    ),
    "many small values": (CHAT, {"messages": [{}] * 10_000}, 413, None, "braces, brackets and commas"),
    "long conversation": (
        CHAT,
        {"messages": [{"role": "user", "content": "seven " * 300}]},
        400,
        "messages",
        "at most 127",
    ),
    "many messages": (CHAT, {"messages": [HI] * 129}, 400, "messages", "more than 128 parts"),
    "many parts": (CHAT, parts(129), 400, "messages.0.content", "has 129 parts, more than 128"),
    "many characters": (CHAT, {"messages": [HI | {"content": "a" * 2100}] * 2}, 400, "messages", "4,096 characters"),
    "images that do not fit": (CHAT, parts(22, WHITE), 400, "messages", "at most 127 can be answered"),
    "temperature": (CHAT, {"messages": [HI], "temperature": 3}, 400, "temperature", "from 0 to 2"),
    "stop": (CHAT, {"messages": [HI], "stop": ["a"] * 5}, 400, "stop", "at most 4"),
    "several answers": (CHAT, {"messages": [HI], "n": 2}, 400, "n", "from 1 to 1"),
    "penalty": (CHAT, {"messages": [HI], "presence_penalty": 1}, 400, "presence_penalty", "from 0 to 0"),
    "top without logprobs": (CHAT, {"messages": [HI], "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    "tools": (CHAT, {"messages": [HI], "tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    "no such path": ("/v1/embeddings", {}, 404, None, "see /v1/models"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_its_error_in_openais_shape(case, url):
    path, body, status, param, named = BAD[case]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, answer, _ = send(url, "POST", path, data, JSON)
    assert found == status, answer
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == param and named in answer["error"]["message"], answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_images_that_do_not_fit_are_not_decoded(monkeypatch):
    monkeypatch.setattr(pictures.Sent, "decode", lambda _: 1 / 0)
    asked = chat_fields.parse(Fields(parts(22, WHITE)), LIMITS)
    with pytest.raises(ApiError, match="at most 127 can be answered"):
        chat_fields.encode(ENCODER, asked, LIMITS)


def test_a_long_image_is_answered_and_the_server_goes_on(client, url):
    messages = [asking("What is it?", Image.new("RGB", (8, 800), "red"))]
    done = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert done.usage.completion_tokens and get(url, "/health")[0] == 200


@pytest.mark.parametrize(
    "host, key, local_host, is_let_in",
    [
        ("127.0.0.2:8000", "", "127.0.0.1", True),
        ("[::1]:8000", "", "127.0.0.1", True),
        ("here.example", "", "Here.example", True),
        ("evil.example", "", "127.0.0.1", False),
        ("10.0.0.1", "", "127.0.0.1", False),
        ("latte.example.org", "a secret", "127.0.0.1", True),  # a proxy on this machine
        ("latte.example.org", "", None, True),
    ],
)
def test_to_whom_requests_must_be_addressed(host, key, local_host, is_let_in):
    front = Front(None, Metrics(), key, local_host, 1)
    with contextlib.nullcontext() if is_let_in else pytest.raises(ApiError, match="only for requests to 127"):
        front._check({"type": "http", "path": "/health", "headers": [(b"host", host.encode())]})


HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


@contextlib.contextmanager
def connections(body):
    """A server of connections whose clients have 0.3 seconds; yields it and its address."""

    async def app(scope, receive, send):
        length = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": body})

    with socket.create_server(("127.0.0.1", 0)) as listening:
        http = functools.partial(Connection, 0.3)
        server = uvicorn.Server(uvicorn.Config(app, http=http, log_level="critical", lifespan="off", ws="none"))
        threading.Thread(target=server.run, args=([listening],), daemon=True).start()
        yield server, listening.getsockname()
        server.should_exit = True


def test_a_connection_without_a_complete_head_is_closed():
    with connections(b"x") as (_, address):
        for sent in (b"", HEAD, HEAD + b"\r\n"):
            with socket.create_connection(address, timeout=4) as own:
                own.sendall(sent)
                if sent.endswith(b"\r\n\r\n"):  # after a complete request, the beginning of another
                    while not own.recv(1000).endswith(b"x"):
                        pass
                    own.sendall(HEAD)
                assert own.recv(1000) == b""


def test_a_response_that_is_not_read_ends_its_connection():
    """One whose responses are read slowly, one after another, does not end."""
    with connections(bytes(20_000_000)) as (server, address), socket.create_connection(address) as stuck:
        stuck.sendall(HEAD + b"\r\n")
        slow = http.client.HTTPConnection(*address, timeout=4)
        for _ in range(2):
            slow.request("GET", "/")
            response, received = slow.getresponse(), 0
            while piece := response.read(1_000_000):
                received += len(piece)
                time.sleep(0.05)
            assert received == 20_000_000
        wait_for(lambda: len(server.server_state.connections) == 1, seconds=2)  # before uvicorn's own five
        (left,) = server.server_state.connections
        assert left.transport.get_extra_info("peername") == slow.sock.getsockname()
        slow.close()


def test_a_request_whose_client_leaves_while_it_waits_leaves_no_task():
    async def cancelled():
        request = Request({"type": "http", "state": {}}, asyncio.Event().wait)
        listener = Listener(request)
        listener.job = SimpleNamespace(cancel=lambda: None)
        waiting = asyncio.ensure_future(anext(listener.events()))
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) > 2
        waiting.cancel()
        await asyncio.sleep(0.1)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert not asyncio.run(cancelled())


def test_no_page_of_another_name_and_no_form_reaches_a_local_server(url):
    assert get(url, "/health", {"Host": "evil.example"})[0] == 403
    assert send(url, "POST", IMAGES, b'{"prompt": "a"}', {"Content-Type": "text/plain"})[0] == 415
    assert send(url, "DELETE", IMAGES, b"")[0] == 405


def test_a_key_is_needed_where_one_is_set(capsys):
    with serving(make_service(), api_key="a secret") as url:
        for key in ("another", "a secre", "a  secret"):
            with (
                openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
                pytest.raises(openai.AuthenticationError, match="API key"),
            ):
                client.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="a secret", max_retries=0) as client:
            assert len(client.models.list().data) == 1
        assert get(url, "/v1/models")[0] == get(url, "/card")[0] == 401
        assert get(url, "/metrics")[0] == 401 and get(url, "/health")[0] == 200
    assert "secret" not in capsys.readouterr().out


def test_requests_that_are_being_prepared_count_as_waiting(url, service, monkeypatch):
    """Their texts are tokenized and their images decoded by one thread."""
    ready, encode = threading.Event(), images_api.encode
    monkeypatch.setattr(images_api, "encode", lambda *args: (ready.wait(60), encode(*args))[1])
    body = json.dumps({"prompt": SEVEN, "num_inference_steps": 1}).encode()
    sockets = [raw(url, IMAGES, body) for _ in range(service.limits.queue)]
    wait_for(lambda: service._in_preparation == service.limits.queue)
    status, answer, _ = send(url, "POST", IMAGES, body, JSON)
    ready.set()
    assert status == 429 and answer["error"]["code"] == "queue_full"
    for each in sockets:
        assert each.recv(12) == b"HTTP/1.1 200"
        each.close()


@pytest.fixture
def slow(service, monkeypatch):
    """Steps take so long that drawings of many steps do not end within a test."""
    original = service.engine._drawings.step
    monkeypatch.setattr(service.engine._drawings, "step", lambda: (time.sleep(0.05), original()))


def test_a_full_queue_says_when_to_come_again(url, service, slow):
    """Long drawings fill the slots and the queue; once their clients are gone, there is room again."""
    body = json.dumps({"prompt": SEVEN, "n": 4, "num_inference_steps": 300}).encode()
    sockets = [raw(url, IMAGES, body)]
    wait_for(lambda: service.engine.counts().running == 1)
    sockets += [raw(url, IMAGES, body) for _ in range(4)]
    wait_for(lambda: service.engine.counts().waiting == 4)
    status, answer, headers = send(url, "POST", IMAGES, body, JSON)
    assert status == 429 and answer["error"]["type"] == "rate_limit_error" and int(headers["Retry-After"]) >= 1
    for each in sockets:
        each.close()
    wait_for(lambda: service.engine.counts().waiting == service.engine.counts().running == 0)
    assert send(url, "POST", IMAGES, json.dumps({"prompt": SEVEN, "num_inference_steps": 1}).encode(), JSON)[0] == 200


def test_a_client_that_leaves_in_the_middle_of_a_stream_frees_its_rows(url, service, slow):
    body = {"prompt": SEVEN, "n": 4, "num_inference_steps": 300, "stream": True, "progress": True}
    own = raw(url, IMAGES, json.dumps(body).encode())
    assert b"image_generation.progress" in own.recv(10_000) + own.recv(10_000)
    own.close()
    wait_for(lambda: service.engine.counts().running == 0)
    wait_for(lambda: 'status="499"' in service.metrics.text().decode())


def raw(url, path, body):
    """A request whose response is not read."""
    own = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=30)
    own.sendall(head_of(path, len(body)) + body)
    return own


def head_of(path, length):
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.01)


def test_a_body_that_does_not_come_is_not_waited_for(url):
    own = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=30)
    own.sendall(head_of(IMAGES, 100) + b"{")
    assert own.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_there_is_one_line_in_the_log_for_each_request(url, client, capfd):
    client.images.generate(prompt=SEVEN, n=2, extra_body={"num_inference_steps": 2, "seed": 4})
    get(url, "/%0Aforged"), get(url, "/health")
    time.sleep(0.2)
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert err == "" and len(lines) == 3
    assert re.fullmatch(r"POST /v1/images/generations 200 \d+\.\d{3}s n=2 steps=2 seed=4", lines[0])
    assert lines[1].startswith("GET /%0Aforged")


def test_an_error_of_ours_is_500_in_the_same_shape(url, service, monkeypatch, capfd):
    monkeypatch.setattr(service, "submit", lambda *_: 1 / 0)
    status, answer, _ = send(url, "POST", IMAGES, b'{"prompt": "a"}', JSON)
    assert status == 500 and answer["error"]["type"] == "server_error" and "ZeroDivision" not in str(answer)
    time.sleep(0.2)
    assert "ZeroDivisionError" in capfd.readouterr().err
