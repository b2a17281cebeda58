"""A run on a disk that is full again and again: one line each time, and nothing saved before is lost."""

import errno
import re
import subprocess

import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter

from lattejax.runs.workdir import Workdir
from lattejax.training.metrics import MetricsLog, RunClock
from tests.helpers import tiny_flags
from tests.training.test_run import Attempts, assert_equal_runs

DISKS = 20
SETTINGS = dict(pretrain__steps=20, train__steps=60, checkpoint__every=5, log_every=5, eval__every=20)


@pytest.fixture
def disk(tmp_path):
    """A disk in memory, and a function that changes its size in kilobytes."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options: str) -> subprocess.CompletedProcess:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)

    if mount("size=64k").returncode:
        pytest.skip("only root may mount a disk")
    yield path, lambda kilobytes: mount(f"remount,size={kilobytes}k")
    subprocess.run(["umount", path], check=True)


def test_events_that_cannot_be_written_are_an_error_where_they_are_written(tmp_path, monkeypatch):
    """Not in a thread, which would end, while the training loop waits for it."""
    workdir = Workdir.at(tmp_path)
    log = MetricsLog(workdir, RunClock(workdir), "train", 0, 1)
    log.write(1, {"loss": 0.5, "loss_per_group": [0.25, 0.75]})
    log.close()
    written = next(workdir.tensorboard("train").glob("events*"))
    assert all(tag in written.read_bytes() for tag in (b"loss", b"loss_per_group/0", b"loss_per_group/1"))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    with pytest.raises(OSError, match="No space left"):
        log.write(2, {"loss": 0.5})


@pytest.mark.slow
def test_nothing_is_lost_on_full_disks(disk, tmp_path, tmp_path_factory, forked_command):
    path, resize = disk
    flags, rng = tiny_flags(**SETTINGS, eval__evaluators__digits__at="never"), np.random.default_rng(0)
    uninterrupted = tmp_path_factory.mktemp("uninterrupted")
    alone = Attempts(forked_command, uninterrupted, flags)
    assert alone.finish() == 0, alone.output()
    needed = sum(file.stat().st_size for file in uninterrupted.rglob("*") if file.is_file()) // 1024
    attempt = Attempts(forked_command, path / "run", flags, output=tmp_path / "output.txt")
    for i, kilobytes in enumerate(sorted(rng.integers(64, 2 * needed, DISKS).tolist())):
        resize(kilobytes)
        if (code := attempt.finish()) == 0:
            break
        print(f"{i}: {kilobytes} kB, exit code {code}: {attempt.output().strip().splitlines()[-1:]}")
        errors = [line for line in attempt.output().splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and re.search("No space left|MB free", errors[0]), attempt.output()
        assert "Traceback" not in attempt.output()
    assert i >= DISKS // 2, "most of them were too large to be full"
    resize(4 * needed)
    assert attempt.finish() == 0, attempt.output()
    assert_equal_runs(path / "run", uninterrupted)
