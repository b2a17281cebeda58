"""Two processes of one device equal one process of two, bit for bit."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from lattejax.weights.runs import Run
from tests.helpers import ENVIRONMENT, ROOT, run_door, start_door, tiny_flags
from tests.training.test_run import assert_equal_runs, final_arrays

SETTINGS = dict(pretrain__steps=0, eval__every=0, eval__final_images=0, eval__scored_images=0)
FLAGS = [*tiny_flags(**SETTINGS), "--config.mesh.expert=2"]
TWO_DEVICES = ENVIRONMENT | {"XLA_FLAGS": ENVIRONMENT["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"}


def run_together(door: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a door in two processes."""
    command = [sys.executable, "launch/local.py", "--processes=2", f"lattejax.{door}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True)


def test_two_processes_train_sample_and_checkpoint_as_one_of_two_devices(tmp_path):
    """Each reads the rows and holds the layers of its own group; one writes. What they leave is read here on one
    device, and what they have saved on two is drawn from by two others."""
    done = [
        run_together("train", *FLAGS, f"--workdir={tmp_path / 'together'}"),
        run_door("train", *FLAGS, f"--workdir={tmp_path / 'alone'}", env=TWO_DEVICES),
    ]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr[-3000:]
    assert "process 0 of 2, with 1 devices" in done[0].stdout and "process 1 of 2" in done[0].stdout
    assert done[0].stdout.count("train 12: ") == done[1].stdout.count("train 12: "), "one process reports"
    assert_equal_runs(tmp_path / "together", tmp_path / "alone")
    assert "fingerprints" not in final_arrays(tmp_path / "together")["progress"]

    drawing = ["--prompt=a handwritten seven", "--prompt=a handwritten two", "--num=3", "--steps=3", "--npz"]
    for name, run, env in (("together", run_together, None), ("alone", run_door, TWO_DEVICES)):
        settings = {"env": env} if env else {}
        out = tmp_path / f"{name}.png"
        done = run("sample", *drawing, f"--workdir={tmp_path / 'together'}", f"--out={out}", **settings)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("6 images in") == 1
    images = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("together", "alone")]
    np.testing.assert_array_equal(*images)
    config = json.loads((tmp_path / "together" / "config.json").read_text())
    assert config["mesh"] == {"expert": 2, "data": -1, "fsdp": 1, "tensor": 1}


def test_a_signal_that_one_process_gets_stops_both_after_the_same_step(tmp_path):
    """Both end with 75, with one checkpoint between them that is whole."""
    flags = [*tiny_flags(**SETTINGS, train__steps=100_000), "--config.mesh.expert=2", f"--workdir={tmp_path}"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        cluster = ["--cluster=explicit", f"--coordinator=127.0.0.1:{listener.getsockname()[1]}", "--processes=2"]
    processes = []
    for number in range(2):
        with open(tmp_path / f"{number}.txt", "w") as output:
            own = [*flags, *cluster, f"--process={number}"]
            processes.append(start_door("train", *own, stdout=output, stderr=output))
    deadline = time.monotonic() + 300
    while not (tmp_path / "metrics.jsonl").exists():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=120) for process in processes]
    assert codes == [75, 75], [(tmp_path / f"{number}.txt").read_text()[-2000:] for number in range(2)]
    run = Run.open(tmp_path)
    assert run.trained_step > 2
    run.trained()


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--cluster=explicit", "--processes=2"], "--cluster=explicit needs --coordinator=host:port"),
        (["--cluster=explicit", "--coordinator=127.0.0.1:9", "--processes=2", "--process=2"], "found .*, 2 and 2"),
        (["--cluster=auto"], "--cluster=auto: the processes do not find each other: "),
    ],
)
def test_processes_that_do_not_find_each_other_are_an_error(flags, named, tmp_path):
    done = run_door("train", *FLAGS, f"--workdir={tmp_path / 'run'}", *flags)
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == 1
    assert re.search(named, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()
