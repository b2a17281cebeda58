"""Bad input is one clear line. The bad values are derived from the config schema, from the flags of each command, and
from every file that is read, so that keys, flags and commands to come are covered too."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import shutil
import signal
import typing
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lattejax import configuration
from lattejax.__main__ import COMMANDS
from lattejax.configuration import Config
from lattejax.data.latents import SPLITS
from lattejax.data.pipeline import every
from lattejax.errors import LONGEST_LINE, UserError
from lattejax.ranges import Range, range_of
from lattejax.runs.data import open_data
from lattejax.runs.records import read_records
from lattejax.runs.results import read_results
from lattejax.runs.run import Run
from lattejax.training.checks import refuse_other_data
from lattejax.weights.autoencoders import StoredAutoencoder
from lattejax.weights.pretrained import Pretrained
from tests import checkpoints
from tests.pixel_features import result

# ---- Numbers in a config


def number_keys(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, type, Range | None, bool]]:
    """Every key that holds a number: its name, type and range, and whether it holds a tuple of them."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            yield from number_keys(kind, f"{name}.")
            continue
        is_tuple = typing.get_origin(kind) is tuple
        scalar = typing.get_args(kind)[0] if is_tuple else kind
        scalar = typing.get_args(scalar)[0] if range_of(kind) else scalar
        if scalar in (int, float):
            yield name, scalar, range_of(kind) and range_of(kind)[1], is_tuple


def bad_numbers(kind: type, allowed: Range) -> list[Any]:
    """Values of a number that its range excludes, or that are no numbers of its type."""
    outside = [allowed.least - 1, allowed.most * 2 + 1, -(2**70), 2**70]
    outside += [allowed.least] * allowed.above + [allowed.most] * allowed.below
    outside = [value for value in outside if value not in allowed]
    if kind is int:
        return [*map(int, outside), 1.5, "1", None, True, math.nan]
    return [*map(float, outside), math.nan, math.inf, -math.inf, 10**400, "1.0", None, True]


def changed(values: dict, key: str, value: Any) -> dict:
    values = copy.deepcopy(values)
    *sections, name = key.split(".")
    functools.reduce(dict.get, sections, values)[name] = value
    return values


def test_every_number_in_a_config_has_a_range_that_is_checked():
    values = configuration.defaults().to_dict()
    for key, kind, allowed, is_tuple in number_keys():
        assert allowed is not None, f"{key} has no range; declare it with its type"
        for bad in bad_numbers(kind, allowed):
            with pytest.raises(UserError, match=key.split(".")[-1]):
                configuration.resolve(changed(values, key, (bad,) * 3 if is_tuple else bad))


# ---- Flags

BAD_NUMBERS = ["nan", "inf", "-inf", "1e300", "-1e300", str(2**70), str(-(2**70)), "many", "", "9" * 5000]
BAD_PATHS = ["", " ", "~nobody-of-this-name/x", "http://a/x", "/proc/x/y", "a" * 300, "{tmp}/file/x", "{tmp}/pipe"]
# Good values for the flags that commands need, by name; the others have defaults.
GOOD_FOR = {
    "convert": {"source": "{checkpoint}"},
    "evaluate": {"out": "{tmp}/new.json"},
    "sample": {"out": "{tmp}/new.png"},
    "sweep": {"config": "configs/ablations.py"},
}
GOOD_BESIDE = {
    "reference": {"inception": "{tmp}/file"},
    "make_reference": {"inception": "{tmp}/file", "out": "{tmp}/new.npz"},
}
GOOD = {
    "config": "configs/digits.py",
    "workdir": "{run}",
    "prompt": "a handwritten seven",
    "question": "What is this?",
    "source": "{run}",
    "topology": "v5e:2x2",
    "results": "{tmp}/file",
    "out": "{tmp}/new",
}


def flags_of(command: str, forked_command: Callable) -> dict[str, str]:
    """The type of each flag that our modules define for a command, by name."""
    listed = ElementTree.fromstring(forked_command(command, "--helpxml").stdout)
    ours = [flag for flag in listed.iter("flag") if "lattejax" in flag.findtext("file")]
    return {flag.findtext("name"): flag.findtext("type") for flag in ours}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return checkpoints.save(checkpoints.random_model(checkpoints.tiny_config()), tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_flags_are_one_line(command, earlier, checkpoint, tmp_path, forked_command):
    figures = {"benchmark": "sample", "against": "torch", "num_groups": 1, "limit": 0.4, "batch_size": 1}
    (tmp_path / "file").write_text(json.dumps(figures | {"seconds": 0.5, "against_seconds": 0.8}))
    os.mkfifo(tmp_path / "pipe")
    known = flags_of(command, forked_command)
    assert len(known) >= 2
    good = {name: value for name, value in GOOD.items() if name in known} | GOOD_FOR.get(command, {})
    words = ["plot"] if command == "benchmark" else []
    places = {"tmp": tmp_path, "run": earlier / "run", "checkpoint": checkpoint}
    tried = []
    for name, kind in known.items():
        assert kind in ("int", "float", "path", "multi path") or not any(
            word in kind for word in ("int", "float", "number")
        ), f"--{name} is a number without a range: define it with cli.define_number"
        bad = BAD_NUMBERS + ["1.5"] * (kind == "int") if kind in ("int", "float") else []
        tried += [(name, value) for value in (BAD_PATHS if "path" in kind else bad)]
    before = sorted(tmp_path.rglob("*"))
    for name, value in [*tried, (next(iter(known)), "\udcff")]:
        flags = good | GOOD_BESIDE.get(name, {}) | {name: value}
        done = forked_command(command, *words, *(f"--{key}={text}".format(**places) for key, text in flags.items()))
        assert_one_line(done, f"{command} --{name}={value!r:.100}")
        given = value.format(**places).strip()[:40]
        is_named = f"--{name}" in done.stderr or (given and given in done.stderr)
        assert is_named, f"{command} --{name}={value!r:.60}: the line is about something else: {done.stderr}"
        assert sorted(tmp_path.rglob("*")) == before, f"--{name}={value!r} has left something"


def assert_one_line(done: Any, what: str) -> None:
    lines = [
        line for line in done.stderr.splitlines() if line.strip() and "the config is of an earlier version" not in line
    ]
    assert done.returncode == 2, f"{what}: {done.returncode}: {done.stderr[-2000:]}"
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) <= LONGEST_LINE, f"{what}: {lines}"


NO_CONFIGS = {
    "no function": "x = 1",
    "an error": "def get_config():\n    raise KeyError('a')",
    "nothing": "def get_config():\n    return None",
    "another dictionary": "def get_config():\n    return {'a': 1}",
    "no dictionary": "def get_config():\n    return 5",
    "YAML": "a: 1",
    "half": "def get_config(",
    "binary": "\0\1",
}


def test_a_config_file_that_gives_no_config_is_one_line(tmp_path, forked_command):
    for what, text in NO_CONFIGS.items():
        (tmp_path / "config.py").write_text(text)
        for command in ("train", "sweep"):
            done = forked_command(command, f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}")
            assert_one_line(done, what)
            assert "config" in done.stderr.replace(str(tmp_path), "") and not (tmp_path / "run").exists()


# ---- Files


class TooSlow(BaseException):
    """No `Exception`, which a reader would take for what it reads."""


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fails if the block takes longer."""

    def fail(*_: Any) -> None:
        raise TooSlow(f"it takes more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def open_run(directory: Path) -> None:
    run = Run.open(directory)
    run.encoder.drawing("a handwritten seven")
    read_records(run.workdir.metrics)
    refuse_other_data(run.config, run.workdir, open_data(run.config), StoredAutoencoder.open("pixels").identity)


def open_weights(directory: Path) -> None:
    Run.open(directory).params()


def open_converted(directory: Path) -> None:
    converted = Pretrained.open(directory)
    converted.encoder.drawing("a handwritten seven")
    converted.params()


def open_autoencoder(directory: Path) -> None:
    stored = StoredAutoencoder.open(str(directory))
    stored.weights("encoder")
    stored.weights("decoder")


def open_latents(directory: Path) -> None:
    values = configuration.defaults().to_dict()
    made = json.loads((directory.parent / "manifest.json").read_text())["encoding"]
    values["data"] |= {
        "latents": str(directory),
        "autoencoder": "pixels",
        "image_size": made["image_size"],
        "latent_shape": tuple(made["latent_shape"]),
    }
    source = open_data(configuration.resolve(values))
    list(source.texts())
    for split in SPLITS:
        list(every(source.drawings(split)))


def open_scores(directory: Path) -> None:
    read_results([str(directory / "scores.json")])


@pytest.fixture(scope="module")
def stored(earlier, tmp_path_factory) -> dict[str, tuple[Path, Callable[[Path], None]]]:
    """A directory of each kind that we read, and what reads it."""
    scores = tmp_path_factory.mktemp("scores")
    (scores / "scores.json").write_text(json.dumps({"results": [result()]}))
    return {
        "run": (earlier / "run", open_run),
        "checkpoints": (earlier / "run", open_weights),
        "export": (earlier / "export", open_weights),
        "latents": (earlier / "latents", open_latents),
        "converted": (checkpoints.convert(checkpoints.random_model(checkpoints.tiny_config())), open_converted),
        "autoencoder": (checkpoints.convert_autoencoder(), open_autoencoder),
        "scores": (scores, open_scores),
    }


PIPE = b"a pipe"


def damages(file: Path, seed: int) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a file, each with a description; None: it is missing, and `PIPE`: a pipe is at its place."""
    data, chance = file.read_bytes(), random.Random(seed)
    for cut in sorted({len(data) * i // 20 for i in range(20)} - {len(data)}):
        yield f"cut at {cut}", data[:cut]
    for i in range(10 if data else 0):
        flipped = bytearray(data)
        for _ in range(3):
            flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        yield f"with flipped bits, {i}", bytes(flipped)
    yield "missing", None
    yield "that is a pipe", PIPE
    yield "binary", b"\xff\x00 binary"
    yield "nested deeply", b"[" * 100_000
    if file.suffix == ".json":
        for where, values in retyped(json.loads(data)):
            yield f"with {where}", json.dumps(values).encode()


def retyped(values: Any) -> Iterator[tuple[str, Any]]:
    """JSON with one value after the other replaced by values of other types; the first item says which."""
    for key in values if isinstance(values, dict) else range(min(3, len(values))):
        for other in (None, "x", -1, math.nan, 1e300, [], {}, [[]]):
            yield f"{key}={other!r}", replaced(values, key, other)
        if isinstance(values[key], dict | list) and len(values[key]) < 200:
            for where, inner in retyped(values[key]):
                yield f"{key}.{where}", replaced(values, key, inner)


def replaced(values: dict | list, key: Any, value: Any) -> dict | list:
    return values | {key: value} if isinstance(values, dict) else [*values[:key], value, *values[key + 1 :]]


def assert_reads_or_refuses(read: Callable[[Path], None], directory: Path, file: Path, what: str) -> None:
    try:
        with at_most(20):
            read(directory)
    except UserError as error:
        assert str(error).strip()
    except (Exception, TooSlow) as error:
        raise AssertionError(f"{file} {what}: {type(error).__name__}: {error}") from error


def test_a_pipe_among_converted_weights_does_not_stop_an_export(stored, tmp_path):
    directory = shutil.copytree(stored["converted"][0], tmp_path / "copy")
    file = next(file for file in sorted((directory / "params").rglob("*")) if file.is_file())
    file.unlink()
    os.mkfifo(file)
    with at_most(20), pytest.raises(UserError, match=file.name):
        Pretrained.open(directory).write_hugging_face(tmp_path / "out")
    assert not (tmp_path / "out").exists()


KINDS = ("run", "checkpoints", "export", "latents", "converted", "autoencoder", "scores")
IN_CI = 30  # damages of each kind, chosen at random; all of them are slow


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind, thorough, stored, tmp_path):
    original, read = stored[kind]
    directory = tmp_path / "copy"
    shutil.copytree(original, directory)
    if kind == "latents":
        shutil.copy(original / "manifest.json", tmp_path / "manifest.json")
    read(directory)
    files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    if kind == "checkpoints":
        files = [file for file in files if "checkpoints" in file.parts or "vlm" in file.parts]
    elif kind == "run":
        files = [file for file in files if not {"checkpoints", "vlm", "tensorboard"} & set(file.parts)]
    count = sum(1 for seed, file in enumerate(files) for _ in damages(file, seed))
    chosen = set(range(count) if thorough else random.Random(kind).sample(range(count), IN_CI))
    number = itertools.count()
    for seed, file in enumerate(files):
        data = file.read_bytes()
        for what, damaged in damages(file, seed):
            if next(number) in chosen:
                file.unlink()
                if damaged is PIPE:
                    os.mkfifo(file)
                elif damaged is not None:
                    file.write_bytes(damaged)
                assert_reads_or_refuses(read, directory, file, what)
                file.unlink(missing_ok=True)
                file.write_bytes(data)
