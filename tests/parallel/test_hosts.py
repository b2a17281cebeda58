"""Two processes of one device equal one process of two devices, bit for bit."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lattejax import configuration
from lattejax.runs.run import Run
from tests.helpers import ENVIRONMENT, NO_DIGITS, ROOT, Fork, Forks, tiny_config, tiny_flags
from tests.training.test_run import assert_equal_runs, final_arrays

SETTINGS = NO_DIGITS | dict(pretrain__steps=0, eval__every=0, train__steps=80, log_every=10, checkpoint__every=1000)
FLAGS = [*tiny_flags(**SETTINGS), "--config.mesh.expert=2"]
TWO_DEVICES = {"XLA_FLAGS": ENVIRONMENT["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"}


def connected() -> list[str]:
    """Flags that connect two processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return ["--cluster=explicit", f"--coordinator=127.0.0.1:{listener.getsockname()[1]}", "--processes=2"]


def start_together(forks: Forks, outputs: list[Path], *command: str) -> list[Fork]:
    """Starts a command in two processes that connect to each other."""
    cluster = connected()
    return [forks.start(*command, *cluster, f"--process={i}", output=output) for i, output in enumerate(outputs)]


def test_two_processes_train_stop_resume_sample_and_checkpoint_like_one_of_two_devices(tmp_path, forked_command):
    """Each reads the rows and holds the layers of its own group; one writes. A signal to one of them stops both after
    the same step, with one common checkpoint. Resumed, they end with the same state as one uninterrupted process of two
    devices. The result is read here on one device, and sampled from by two other processes."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    outputs = [tmp_path / f"{i}.txt" for i in range(2)]
    processes = start_together(forked_command, outputs, "train", *FLAGS, f"--workdir={together}")
    deadline = time.monotonic() + 300
    while not (together / "metrics.jsonl").exists():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait() for process in processes] == [75, 75], outputs[0].read_text()[-2000:]
    assert 10 <= Run.open(together).trained_step < 80
    Run.open(together).trained()

    command = [sys.executable, "launch/local.py", "--processes=2", "lattejax.train", *FLAGS, f"--workdir={together}"]
    resumed = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True)
    uninterrupted = forked_command("train", *FLAGS, f"--workdir={alone}", env=TWO_DEVICES)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert uninterrupted.returncode == 0, uninterrupted.stderr[-3000:]
    assert "process 0 of 2, with 1 devices" in resumed.stdout and "process 1 of 2" in resumed.stdout
    assert resumed.stdout.count("train 80 of") == uninterrupted.stdout.count("train 80 of"), "one process reports"
    assert_equal_runs(together, alone)
    assert "fingerprints" not in final_arrays(together)["progress"]
    assert json.loads((together / "config.json").read_text())["mesh"] == dict(expert=2, data=-1, fsdp=1, tensor=1)

    drawing = ["--prompt=a handwritten seven", "--prompt=a handwritten two", "--num=3", "--steps=3", "--npz"]
    drawing = ["sample", *drawing, f"--workdir={together}"]
    processes = start_together(forked_command, outputs, *drawing, f"--out={tmp_path / 'together.png'}")
    assert [process.wait() for process in processes] == [0, 0], outputs[0].read_text()[-2000:]
    assert [output.read_text().count("6 images in") for output in outputs] == [1, 0]
    drawn = forked_command(*drawing, f"--out={tmp_path / 'alone.png'}", env=TWO_DEVICES)
    assert drawn.returncode == 0, drawn.stderr[-3000:]
    images = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("together", "alone")]
    np.testing.assert_array_equal(*images)


UNREADABLE = """
import sys
from lattejax import cli, train
from lattejax.parallel import hosts
from lattejax.runs.checkpoints import Checkpoints

def read(*arguments):
    raise OSError("the disk is gone")

Checkpoints._read = read
hosts.SECONDS_TO_FAIL_TOGETHER = 3
cli.run(train.main)
"""


BROKEN = """
from lattejax import cli
connect = cli.define_cluster_flags()

def main():
    connect()
    raise TypeError("a bug of ours")

cli.run(main)
"""


def run_both(flags: list[str], *programs: list[str]) -> list[str]:
    """Runs two connected processes, which must end with exit code 2 in time; returns their errors."""
    flags = [*flags, *connected()]
    streams = dict(cwd=ROOT, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    processes = [
        subprocess.Popen([sys.executable, *program, *flags, f"--process={i}"], **streams)
        for i, program in enumerate(programs)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    return errors


def test_one_process_that_fails_or_is_stopped_ends_both(tmp_path, forked_command):
    """A signal in the first compilation ends both before a step, and one in an evaluation before its end, with the
    step before it saved; a checkpoint that one cannot read ends both, too."""
    outputs, workdir = [tmp_path / f"{i}.txt" for i in range(2)], tmp_path / "run"
    flags = [*FLAGS, "--config.train.steps=2", f"--workdir={workdir}"]

    def stop_when(reached: Callable[[], bool]) -> None:
        processes = start_together(forked_command, outputs, "train", *flags)
        deadline = time.monotonic() + 100
        while not reached():
            assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait() for process in processes] == [75, 75], [output.read_text() for output in outputs]
        assert "process 1 has ended all: stopped by SIGTERM" in outputs[0].read_text()

    stop_when(lambda: "trained parameters" in outputs[0].read_text())
    assert not (workdir / "metrics.jsonl").exists(), "no step was finished"
    stop_when((workdir / "checkpoints" / "train" / "2").exists)
    assert Run.open(workdir).trained_step == 2
    assert "held_out_loss" not in (workdir / "metrics.jsonl").read_text(), "the evaluation was not finished"
    errors = run_both(flags, ["-m", "lattejax.train"], ["-c", UNREADABLE])
    reason = "cannot be read by process 1: OSError: the disk is gone"
    assert all(reason in error for error in errors) and "process 1 has ended all: " in errors[0], errors


def test_of_several_processes_each_that_has_a_bug_prints_its_traceback():
    for error in run_both([], ["-c", BROKEN], ["-c", BROKEN]):
        assert "Traceback" in error and "TypeError: a bug of ours" in error, error


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--cluster=explicit", "--processes=2"], "--cluster=explicit needs --coordinator=host:port"),
        (["--cluster=explicit", "--coordinator=127.0.0.1:9", "--processes=2", "--process=2"], "found .*, 2 and 2"),
        (["--cluster=auto"], "--cluster=auto: the processes cannot connect: "),
    ],
)
def test_processes_that_cannot_connect_are_an_error(flags, named, tmp_path, forked_command):
    done = forked_command("train", *FLAGS, f"--workdir={tmp_path / 'run'}", *flags)
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == 1
    assert re.search(named, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


def test_processes_connect_before_they_open_a_run_to_start_from(tmp_path, forked_command):
    """Opening one takes a process's devices, after which JAX connects no more."""
    configuration.save(tiny_config(), tmp_path / "config.json")
    flags = [f"--config.pretrain.init_from={tmp_path}", f"--workdir={tmp_path / 'run'}", "--cluster=auto"]
    done = forked_command("train", *FLAGS, *flags)
    assert "the processes cannot connect: " in done.stderr and "before any JAX calls" not in done.stderr
