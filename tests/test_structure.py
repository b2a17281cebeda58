"""Imports point only downwards: no package imports one above it or the tests, and no modules import each other.
Files are short, and ruff finds nothing."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.helpers import ROOT

# From the top. Packages in one line do not import each other.
LAYERS = """
    __main__ train sample chat evaluate convert encode serve plan sweep benchmark harness
    cli
    sweeps benchmarks pods serving encoding scoring
    training
    evaluation
    objectives
    sampling
    runs
    weights
    data
    parallel
    configuration
    models
    flow
    files
    leases
    errors interrupts ranges
"""
LEVELS = {name: level for level, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
PACKAGE = ROOT / "lattejax"


def modules() -> dict[str, str]:
    """Every module of the package, and its source."""
    files = [file for file in PACKAGE.rglob("*.py") if "experiments" not in file.parts]
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    return {names[file]: file.read_text() for file in files}


def imported(source: str, known: set[str]) -> Iterator[str]:
    """The modules that a source imports anywhere; modules of the package by their full names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full_name = f"{node.module}.{alias.name}"
                yield full_name if full_name in known else node.module


SOURCES = modules()
IMPORTS = {name: sorted(set(imported(source, set(SOURCES)))) for name, source in SOURCES.items()}


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"lattejax"}))
def test_a_module_imports_nothing_from_above(name):
    part = name.split(".")[1]
    for other in IMPORTS[name]:
        assert not other.startswith("tests"), f"{name} imports {other}"
        if other.startswith("lattejax.") and (theirs := other.split(".")[1]) != part:
            assert LEVELS[theirs] > LEVELS[part], f"{name} imports {other}, which is above or beside it"


def test_no_modules_import_each_other():
    graph = {name: [other for other in others if other in SOURCES] for name, others in IMPORTS.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names them


def test_files_are_at_most_320_lines():
    long = {name: lines for name, source in SOURCES.items() if (lines := len(source.splitlines())) > 320}
    assert not long


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_finds_nothing(arguments):
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
