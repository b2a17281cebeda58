"""Sets of drawings in processes of their own: killed at any instant, and on several devices."""

import os
import random
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from lattejax.files import resolve_path
from lattejax.scoring.reference import make_reference
from lattejax.scoring.sources import open_samples
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from tests.helpers import ENVIRONMENT, NO_SCORES, ROOT, tiny_config
from tests.pixel_features import PixelFeatures, random_pictures

PROGRAM = """
import sys
from lattejax.evaluation.adm import ReferenceFile
from lattejax.files import resolve_path
from lattejax.parallel import hosts
from lattejax.parallel.mesh import make_mesh
from lattejax.runs.run import Run
from lattejax.scoring.drawn import drawn_points, read_prompts
from lattejax.scoring.points import score_points
from tests.pixel_features import PixelFeatures

workdir, reference, out, num, batch_size, *cluster = sys.argv[1:]
if cluster:
    hosts.connect("explicit", cluster[0], 2, int(cluster[1]))
run = Run.open(workdir, make_mesh({"data": -1}))
settings = dict(num=int(num), guidance=[2.0], steps=[3], seed=0, batch_size=int(batch_size))
points = drawn_points(run, read_prompts(run, None), **settings)
score_points(points, ReferenceFile.open(reference), PixelFeatures(), resolve_path(out), part=50, keep_pictures=True)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("killed")
    settings = dict(pretrain__steps=0, train__steps=2, train__learning_rate=0.05, train__ema_decay=0.0, eval__every=0)
    stages.train(tiny_config(**settings | NO_SCORES), directory / "run", InterruptGuard())
    np.savez(directory / "real.npz", arr_0=random_pictures(60))
    source = open_samples(str(directory / "real.npz"), 100, None)
    make_reference(source, resolve_path(directory / "ref.npz"), PixelFeatures(), pictures=20, part=100)
    return [str(directory / "run"), str(directory / "ref.npz")]


def start(
    inputs: list[str], out: os.PathLike, num: int, batch_size: int, devices: int = 1, cluster: tuple[str, ...] = ()
) -> subprocess.Popen:
    flags = f"{ENVIRONMENT.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = ENVIRONMENT | {"XLA_FLAGS": flags, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", PROGRAM, *inputs, str(out), str(num), str(batch_size), *cluster]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def complete(process: subprocess.Popen) -> str:
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


@pytest.mark.slow
def test_a_set_that_is_killed_is_the_set_that_was_not(inputs, tmp_path):
    """2,000 drawings, killed five times at random instants; a part that was complete is not drawn again."""
    process = start(inputs, tmp_path / "whole.json", 2000, 50)
    times = [time.monotonic() for line in process.stderr if "guidance_2_steps_3: " in line]
    complete(process)
    seconds_of_a_part = (times[-1] - times[0]) / (len(times) - 1)
    chance, parts = random.Random(0), 0
    for _ in range(5):
        process = start(inputs, tmp_path / "killed.json", 2000, 50)
        for _ in range(chance.randrange(1, 4)):  # a line for each part, the first of them for the reference
            process.stderr.readline()
        time.sleep(chance.uniform(0, seconds_of_a_part))
        process.kill()
        process.wait()
        complete_parts = len(list((tmp_path / "killed.json.parts" / "guidance_2_steps_3").glob("*.npz")))
        assert parts <= complete_parts < 40
        parts = complete_parts
    errors = complete(start(inputs, tmp_path / "killed.json", 2000, 50))
    assert errors.count("guidance_2_steps_3: ") == 40 - parts
    name = "guidance_2_steps_3.npz"
    assert (tmp_path / f"killed_{name}").read_bytes() == (tmp_path / f"whole_{name}").read_bytes()
    assert (tmp_path / "killed.json").read_text() == (tmp_path / "whole.json").read_text()


@pytest.mark.slow
def test_a_set_does_not_depend_on_devices_processes_and_batches(inputs, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    two = [start(inputs, tmp_path / "two.json", 70, 20, 2, (coordinator, str(i))) for i in range(2)]
    errors = [complete(process) for process in two]
    assert [text.count("70 of 70 pictures, complete") for text in errors] == [1, 0], "one process writes"
    for name, batch_size, devices in (("one", 30, 1), ("four", 24, 4)):
        complete(start(inputs, tmp_path / f"{name}.json", 70, batch_size, devices))
    drawn = {name: np.load(tmp_path / f"{name}_guidance_2_steps_3.npz")["arr_0"] for name in ("one", "four", "two")}
    for name in ("four", "two"):
        assert drawn[name].shape == (70, 8, 8, 3)
        assert np.abs(drawn[name].astype(int) - drawn["one"]).max() <= 1, name
