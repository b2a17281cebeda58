"""The package as it is installed: from its wheel, outside a checkout, and with the versions that are locked."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.helpers import ENVIRONMENT, NO_DIGITS, ROOT, tiny_flags


def requirements(python: str) -> list[Requirement]:
    """Ours on a version of Python, those of the extras among them."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    every = map(Requirement, [line for line in lines if line] + [one for extra in extras.values() for one in extra])
    return [one for one in every if one.marker is None or one.marker.evaluate({"python_version": python})]


@pytest.mark.parametrize("python, jax", [("3.11", "0.10.2"), ("3.13", "0.12.0.1")])
def test_locked_versions_are_those_that_are_required(python, jax):
    lines = (ROOT / "launch" / f"locked-python{python}.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert locked["jax"] == locked["jaxlib"] == locked["jax-cuda12-plugin"] == locked["jax-cuda13-plugin"] == jax
    for one in requirements(python):
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        assert one.specifier.contains(locked[name]), f"{one} and {name}=={locked[name]}"


def test_the_wheel_trains_in_an_empty_directory(tmp_path):
    """By the name of a packaged experiment, and with nothing of the checkout in reach."""
    wheel, installed, here = tmp_path / "wheel", tmp_path / "installed", tmp_path / "here"
    here.mkdir()
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={wheel}", str(ROOT)], check=True)
    subprocess.run([*pip, "install", "--no-deps", f"--target={installed}", *map(str, wheel.iterdir())], check=True)
    _, *tiny = tiny_flags(**NO_DIGITS, pretrain__steps=0, train__steps=2, eval__every=0)
    command = [sys.executable, "-P", "-m", "lattejax.train", "--config=digits", *tiny, "--workdir=run"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=here, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((here / "run" / "results.json").read_text())
    assert os.listdir(here) == ["run"]
