"""The launchers, with fake gcloud, srun and scontrol commands."""

import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tarfile

import pytest

from tests.helpers import ROOT


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Puts fake commands on the path, which log their arguments and then run the given script."""

    def play(name: str, script: str) -> pathlib.Path:
        calls = tmp_path / f"{name}.calls"
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/usr/bin/env bash\necho "$*" >> {calls}\ncalls={calls}\n{script}\n')
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
        return calls

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return play


# A slice that is created, is preempted once during training, and once exits with its state saved.
GCLOUD = """
trainings=$(grep -c lattejax.train "$calls")
case "$*" in
    *describe*)
        grep -q " create " "$calls" || exit 1
        [[ $trainings == 1 && ! -e $calls.back ]] && echo PREEMPTED || echo READY ;;
    *delete*) touch "$calls.back" ;;
    *" scp "*) cp "$5" "$calls.tar.gz" ;;
    *lattejax.train*) case $trainings in 1) exit 255 ;; 2) exit 75 ;; *) exit "${LAST:-0}" ;; esac ;;
esac
"""


@pytest.mark.parametrize("last", [0, 2])
def test_a_tpu_pod_is_recreated_after_a_preemption_and_training_resumes(played, last, tmp_path):
    calls = played("gcloud", GCLOUD)
    environment = os.environ | {"TPU": "pod", "ZONE": "here", "TYPE": "v5litepod-16", "PAUSE": "0", "LAST": str(last)}
    environment["PYTHON"] = "3.11.9"
    for part in ("launch", "lattejax", "configs", "pyproject.toml", "README.md"):
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, tmp_path / "clone" / part)
    for made in ("pictures/a.jpg", "runs/a/config.json", "exported/a.json", "my_env/pyvenv.cfg", ".git/HEAD"):
        (tmp_path / "clone" / made).parent.mkdir(parents=True)
        (tmp_path / "clone" / made).touch()
    command = ["launch/tpu_pod.sh", "--config=configs/imagenet256.py", "--workdir=gs://bucket/a run"]
    done = subprocess.run(command, cwd=tmp_path / "clone", env=environment, capture_output=True, text=True)
    assert done.returncode == last, done.stderr
    lines = calls.read_text().splitlines()
    made = [line for line in lines if " create " in line]
    assert len(made) == 2 and all("--spot" in line and "--accelerator-type=v5litepod-16" in line for line in made)
    assert sum(" delete " in line for line in lines) == 1
    trained = [line for line in lines if "lattejax.train" in line]
    assert len(trained) == 3
    installed = calls.read_text().partition("lattejax.train")[0]
    assert "--python=3.11.9 ~/env" in installed and ".[tpu,data,gcs]" in installed, "a host's own Python is 3.10"
    assert "--worker=all" in trained[0] and "--cluster=auto --preemption_notice=http://metadata." in trained[0]
    assert r"--workdir=gs://bucket/a\ run" in trained[0]
    with tarfile.open(f"{calls}.tar.gz") as archive:
        assert not any(member.isdir() for member in archive), "one that changes meanwhile would end the launch"
        names = set(archive.getnames())
    assert {"./pyproject.toml", "./README.md", "./lattejax/train.py", "./configs/imagenet256.py"} <= names
    assert not any(re.match(r"\./(\.|runs/|pictures/|exported/|my_env/)|.*__pycache__", name) for name in names)


def test_a_tpu_pod_needs_its_name():
    done = subprocess.run(["launch/tpu_pod.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "TPU: is the name of the slice" in done.stderr


@pytest.mark.parametrize("code, ends, requeued", [(0, 0, False), (75, 0, True), (2, 2, False)])
def test_a_slurm_job_is_requeued_after_exit_code_75(played, code, ends, requeued):
    ran, asked = played("srun", f"exit {code}"), played("scontrol", "")
    environment = os.environ | {"SLURM_JOB_ID": "17"}
    done = subprocess.run(["launch/slurm.sh", "--workdir=there"], cwd=ROOT, env=environment)
    assert done.returncode == ends
    assert ran.read_text().strip().endswith("-m lattejax.train --cluster=auto --workdir=there")
    assert (asked.read_text().strip() == "requeue 17") if requeued else not asked.exists()


PART = """
import pathlib, sys, time
number = sys.argv[-1].removeprefix("--process=")
sys.stdout.write(" ".join(sys.argv[1:]) + "\\n")  # in one write: two processes share the pipe
sys.stdout.flush()
starts = pathlib.Path(sys.argv[1])
count = len(list(starts.iterdir()))
(starts / f"{number} {time.time()}").touch()
if number == "1" and count < 2:
    sys.exit(75)
if count < 2:
    time.sleep(60)
"""


def test_local_processes_stop_together_and_restart(tmp_path):
    """The second process exits with 75: the first is stopped too, and both are restarted."""
    (tmp_path / "part.py").write_text(PART)
    starts = tmp_path / "starts"
    starts.mkdir()
    command = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2"]
    done = subprocess.run([*command, "part", str(starts)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 75, "without --retries"
    assert subprocess.run([*command, "--processes=0", "part"], cwd=tmp_path, capture_output=True).returncode == 2
    assert len(list(starts.iterdir())) == 2
    for file in starts.iterdir():
        file.unlink()
    done = subprocess.run([*command, "--retries=1", "part", str(starts)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (line.split() for line in sorted(done.stdout.splitlines()[-2:], key=lambda line: line[-1]))
    assert (first[1], first[3]) == ("--cluster=explicit", "--processes=2")
    assert first[2].startswith("--coordinator=127.0.0.1:")
    assert first[:4] == second[:4] and (first[4], second[4]) == ("--process=0", "--process=1")
