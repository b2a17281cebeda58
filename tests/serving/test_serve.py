"""The command: it serves a run, stops when asked to, and refuses what would not work before it reads weights."""

import json
import re
import signal
import socket
import time
import urllib.request

import numpy as np
import pytest

from lattejax.flow.schedule import Sampling
from lattejax.sampling.images import ImageSampler
from tests.serving.serving import pixels

SMALL = ["--batch_size=2", "--pictures=4", "--images_per_request=4", "--conversations=2", "--context_tokens=60"]


@pytest.fixture
def workdir(earlier):
    (earlier / "run" / "results.json").write_text('{"answer_accuracy": 0.5, "seconds": 3.0, "name": "a"}')
    return earlier / "run"


def assert_refused(done, named):
    """The last line says so; a line before it may say that an earlier version has made the run."""
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert named in done.stderr and done.stderr.count("\n") <= 2, done.stderr


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def test_it_serves_a_run_until_it_is_stopped(workdir, tmp_path, forked_command):
    """A drawing that runs when SIGTERM comes is completed, and the exit code is 0."""
    log = tmp_path / "log"
    started = forked_command.start("serve", f"--workdir={workdir}", "--port=0", *SMALL, output=log)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"serving .* at (http://127\.0\.0\.1:\d+)$", log.read_text(), re.M)):
            assert started.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        url = found[1]
        assert re.search(r"compiled \d+ programs in \d+ s", log.read_text())
        card = json.load(urllib.request.urlopen(f"{url}/card"))
        assert [group["interval"] for group in card["groups"]] == [[0, 0.5], [0.5, 1]] and card["scores"] == {
            "answer_accuracy": 0.5
        }
        page = urllib.request.urlopen(url)
        assert b"page.js" in page.read() and "default-src 'self'" in page.headers["content-security-policy"]

        body = {"prompt": "a handwritten two", "n": 4, "num_inference_steps": 200, "seed": 3}
        running = post(url, "/v1/images/generations", body | {"stream": True, "progress": True})
        first = running.readline()
        started.send_signal(signal.SIGTERM)
        rest = first + running.read()
        assert started.wait() == 0
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGKILL)
    data = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith(b"data: ")]
    pictures = [one for one in data if one["type"] == "image_generation.completed"]
    drawn = np.stack([pixels(one["b64_json"]) for one in sorted(pictures, key=lambda one: one["index"])]).astype(int)
    sampler = ImageSampler.load(workdir)
    prompts = [sampler.encoder.drawing("a handwritten two")]
    expected = sampler(prompts, Sampling(200), images_per_prompt=4, batch_size=4, seed=3)
    assert np.abs(drawn - expected).max() <= 1
    lines = log.read_text().splitlines()
    assert len(lines) <= 6 and lines[-1].startswith("POST /v1/images/generations 200 "), lines


def test_an_address_for_others_needs_a_key(workdir, forked_command):
    done = forked_command("serve", f"--workdir={workdir}", "--host=0.0.0.0", "--port=0")
    assert_refused(done, "--api_key, or --open")


def test_a_port_in_use_and_limits_that_contradict_are_one_line(workdir, forked_command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {f"--port={port}": "cannot listen there", "--pictures=2": "images_per_request=10 must be at most"}
        for flag, named in (
            cases
            | {"--host=no such host": "no such address", "--api_key= ": "--api_key is empty"}
            | {"--api_key=clé": "not printable ASCII"}
        ).items():
            done = forked_command("serve", f"--workdir={workdir}", flag)
            assert_refused(done, named)
