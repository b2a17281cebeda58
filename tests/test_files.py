"""Paths and files, local and remote."""

import os
import pathlib

from etils import epath

from lattejax.files import is_remote, write_whole
from lattejax.weights.runs import Workdir


def test_workdirs_are_absolute_and_remote_ones_stay_as_they_are():
    assert os.fspath(Workdir.at("runs/a").path) == str(pathlib.Path("runs/a").absolute())
    assert os.fspath(Workdir.at("~/a").path) == str(pathlib.Path.home() / "a")
    remote = Workdir.at("gs://bucket/run")
    assert is_remote(remote.vlm) and os.fspath(remote.vlm) == "gs://bucket/run/vlm"


def test_files_are_replaced_whole_and_leave_nothing_beside(tmp_path):
    path = epath.Path(tmp_path) / "new" / "file.txt"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]
