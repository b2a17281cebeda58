"""The changes that docs/extending.md shows fit the code, and its weighting of the loss does what it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

# The file that the line before a block begins with, and its hunks.
BLOCK = re.compile(r"^(?:In |Register it in )?`([\w/]+\.py)`.*:\n\n```diff\n([\s\S]*?)```", re.M)
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.M)}
WEIGHTING = BLOCK.findall(SECTIONS["A term or a weighting of the loss"])


def apply(diff: str, file: Path) -> None:
    """Applies hunks, which an @@ line separates, where their lines stand in the file; each stands there once."""
    text = file.read_text()
    for hunk in filter(None, re.split(r"^@@.*\n", diff, flags=re.M)):
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        assert text.count(before) == 1, f"{file.name} has {text.count(before)} times:\n{before}"
        text = text.replace(before, after)
    file.write_text(text)


@pytest.mark.parametrize("name, diff", [block for block in BLOCK.findall(PAGE) if block not in WEIGHTING])
def test_a_change_fits_its_file(name, diff, tmp_path):
    file = shutil.copy(ROOT / "lattejax" / name, tmp_path)
    apply(diff, Path(file))
    compile(Path(file).read_text(), name, "exec")


def test_every_change_names_its_file():
    assert PAGE.count("```diff") == len(BLOCK.findall(PAGE)) == 6


# With losses that depend on t alone, t² in group 0 and 1 − t in group 1, so that no network runs.
CHECK = """
import numpy as np
from lattejax import configuration
from lattejax.errors import UserError
from lattejax.experiments import digits
from lattejax.training.generation_stage import flow_loss


def resolve(weight):
    config = digits.get_config()
    config.model.num_groups = 2
    config.train.update(density="shifted", density_shift=0.5, time_weight=weight)
    return configuration.resolve(config)


def known(params, contexts, t):
    return np.stack([t[0] ** 2, 1 - t[1]])


u = np.random.default_rng(0).random(4000).astype(np.float32)
for weight in (0.0, 2.0):
    loss = flow_loss(resolve(weight))
    object.__setattr__(loss, "losses", known)
    cells = (np.arange(200_000) + 0.5) / 200_000
    t = np.asarray(loss.density.quantile(cells))
    plain = np.where(t < 0.5, t**2, 1 - t)
    expected = np.mean(np.exp(weight * t) * plain)
    masses = loss.intervals.masses(loss.density)
    unweighted = np.array([np.mean(plain[t < 0.5]), np.mean(plain[t >= 0.5])])
    for total, per_group in (loss.of_shares({}, None, (), u.reshape(2, -1)), loss.of_owners({}, None, (), u)):
        np.testing.assert_allclose(total, expected, rtol=0.05)
        np.testing.assert_allclose(per_group, unweighted, rtol=0.05)
        if not weight:
            np.testing.assert_allclose(total, per_group @ masses, rtol=1e-5)
try:
    resolve(21.0)
except UserError as error:
    assert "time_weight" in str(error)
else:
    raise AssertionError("a weight outside its range is taken")
"""


def test_the_weighting_of_the_loss_does_what_it_says(tmp_path):
    """Both ways to draw t have the weighted mean; each group's loss in the metrics stays unweighted."""
    package = shutil.copytree(ROOT / "lattejax", tmp_path / "lattejax", ignore=shutil.ignore_patterns("__pycache__"))
    for name, diff in WEIGHTING:
        apply(diff, package / name)
    changed = [package / name for name, _ in WEIGHTING]
    ruff = [sys.executable, "-m", "ruff", "format", "--check", f"--config={ROOT / 'pyproject.toml'}", *changed]
    subprocess.run(ruff, check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
