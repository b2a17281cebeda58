"""One writer at a time: who holds the lease, and when it is taken over."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from lattejax import leases
from lattejax.errors import UserError
from lattejax.files import new_directory
from lattejax.leases import one_writer
from tests.helpers import ENVIRONMENT, ROOT, tiny_flags

HOLD = """
import socket, sys, time
host, path = sys.argv[1:]
if host:
    socket.gethostname = lambda: host
from lattejax import leases
leases.SECONDS = 1.2
with leases.one_writer(path, path):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lease on tmp_path/run, on this host or as if on another."""
    started = []

    def start(host: str = "") -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, host, str(tmp_path / "run")]
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def take(path) -> float:
    """Takes the lease; returns how long that took."""
    started = time.monotonic()
    with one_writer(path, "runs/a"):
        return time.monotonic() - started


def test_a_second_process_is_refused_and_told_who_writes(holder, tmp_path, monkeypatch):
    process = holder()
    monkeypatch.setattr(leases, "SECONDS", 1.2)
    with pytest.raises(UserError, match=rf"runs/a is being written by process {process.pid} on \S+ since 20\d\d-"):
        take(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert take(tmp_path / "run") < 5, "the lease of a killed process counts for nothing"
    assert list(tmp_path.iterdir()) == []


def test_another_hosts_lease_is_over_when_it_is_not_renewed(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "SECONDS", 1.2)
    process = holder("elsewhere")
    with pytest.raises(UserError, match=rf"is being written by process {process.pid} on elsewhere since"):
        take(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0.5 < take(tmp_path / "run") < 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_training_is_refused_beside_another(command, tmp_path, forked_command):
    config = tiny_flags() if command == "train" else ["--config=ablations"]
    with one_writer(tmp_path / "out" / {"train": ".run", "sweep": ".sweep"}[command], "it"):
        done = forked_command(command, *config, f"--workdir={tmp_path / 'out'}")
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"error: .* is being written by process {os.getpid()} on .*\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_has_left_is_removed_by_the_next_but_not_beside_a_living_one(tmp_path):
    (tmp_path / "out.partial-00000000").mkdir()
    beside, refused = one_writer(tmp_path / ".out", "it"), pytest.raises(UserError, match="is being written by")
    with beside, refused, new_directory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial-00000000"]
    with new_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
