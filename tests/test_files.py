"""Paths and files, local and remote, and what the system refuses."""

import os
import pathlib

import pytest
from etils import epath

from lattejax.errors import UserError, refusal
from lattejax.files import check_writable, is_remote, new_directory, write_atomically
from lattejax.runs.workdir import Workdir


def test_workdirs_become_absolute_and_remote_ones_stay_unchanged():
    assert os.fspath(Workdir.at("runs/a").path) == str(pathlib.Path("runs/a").absolute())
    assert os.fspath(Workdir.at("~/a").path) == str(pathlib.Path.home() / "a")
    remote = Workdir.at("gs://bucket/run")
    assert is_remote(remote.vlm) and os.fspath(remote.vlm) == "gs://bucket/run/vlm"


def test_files_are_replaced_atomically_and_leave_no_temporary_files(tmp_path):
    path = epath.Path(tmp_path) / "new" / "file.txt"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]


def test_a_directory_appears_when_everything_is_written_or_not_at_all(tmp_path):
    out = tmp_path / "below" / "out"
    with pytest.raises(KeyboardInterrupt), new_directory(out) as directory:
        (directory / "half").write_text("a")
        raise KeyboardInterrupt
    assert list(out.parent.iterdir()) == []
    out.mkdir()  # an empty directory counts as none
    with new_directory(out) as directory:
        assert not list(directory.iterdir())
        (directory / "file").write_text("b")
        assert not list(out.iterdir())
    assert [path.name for path in out.iterdir()] == ["file"] and list(out.parent.iterdir()) == [out]
    with pytest.raises(UserError, match="exists already"), new_directory(out):
        pass
    with pytest.raises(UserError, match="cannot be written"), new_directory(out / "file" / "out"):
        pass


def test_a_check_before_writing_creates_nothing_that_other_processes_could_meet(tmp_path, monkeypatch):
    """Not even for a moment: another process may be creating its files in the same new directory."""
    monkeypatch.setattr(os, "mkdir", lambda *_: pytest.fail("a directory was created"))
    check_writable(epath.Path(tmp_path) / "new" / "below" / "file", "--out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("kept")
    check_writable(epath.Path(tmp_path) / "file", "--out")
    assert (tmp_path / "file").read_text() == "kept"
    for bad in ("file/below", "file/a/b", "a" * 300, f"new/{'a' * 300}/file"):
        with pytest.raises(UserError, match="--out cannot be written: "):
            check_writable(epath.Path(tmp_path) / bad, "--out")


def test_of_two_concurrent_writers_the_second_is_refused(tmp_path):
    with new_directory(tmp_path / "out") as first:
        (first / "a").write_text("first")
        second = new_directory(tmp_path / "out")
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on .* since 20"), second:
            pass
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"a": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_has_left_is_removed_whatever_the_name(tmp_path):
    left = tmp_path / "out[1].partial-0"
    left.mkdir()
    with new_directory(tmp_path / "out[1]"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out[1]"]


def raised(error, during):
    """An error as it is when it is raised while another is handled."""
    error.__context__ = during
    return error


def test_what_the_system_refused_is_found_below_a_librarys_error_and_not_below_a_bug():
    refused = FileNotFoundError(2, "No such file or directory", "a.txt")
    assert refusal(raised(ValueError("cannot be read"), refused)) == "a.txt: No such file or directory"
    caused = raised(TypeError("no"), KeyError(1))
    caused.__cause__ = refused
    assert refusal(caused) == "a.txt: No such file or directory"
    assert refusal(raised(KeyError("a"), refused)) is None
    hidden = raised(ValueError("no"), refused)
    hidden.__suppress_context__ = True
    assert refusal(hidden) is None
