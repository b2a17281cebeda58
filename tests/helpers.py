"""Shared by several tests: the smallest config that runs all code, and its parts."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from ml_collections import ConfigDict

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.data import tokenizer as tokenizers
from lattejax.data.digits import DigitSource
from lattejax.data.prompts import PromptEncoder, prompt_encoder
from lattejax.training.loop import run_stage

ROOT = pathlib.Path(__file__).resolve().parents[1]

# configs/digits.py reduced to seconds, with every code path.
TINY = {
    "log_every": 2,
    "model.num_groups": 2,
    "model.text.hidden_size": 32,
    "model.text.intermediate_size": 48,
    "model.text.num_layers": 4,
    "model.text.num_heads": 4,
    "model.text.num_kv_heads": 2,
    "model.text.mrope_section": (1, 2, 1),
    "model.vision.depth": 1,
    "model.vision.embed_dim": 16,
    "model.vision.hidden_size": 32,
    "pretrain.steps": 6,
    "pretrain.batch_size": 4,
    "pretrain.accumulation": 1,
    "pretrain.warmup_steps": 2,
    "pretrain.unroll": False,
    "train.steps": 12,
    "train.batch_size": 8,
    "train.accumulation": 1,
    "train.warmup_steps": 2,
    "train.learning_rate": 2e-3,
    "train.unroll": False,
    "train.answer_batch_size": 4,
    "eval.every": 6,
    "eval.examples": 8,
    "eval.images_per_prompt": 2,
    "eval.sample_steps": 3,
    "eval.batch_size": 100,
    "eval.evaluators.digits.images": 20,
    "eval.evaluators.final_digits.images": 20,
    "checkpoint.every": 4,
}
# Overrides that disable the digits' scores, or all scores that need the digits.
NO_DIGITS = {f"eval__evaluators__{name}__at": "never" for name in ("digits", "final_digits")}
NO_SCORES = NO_DIGITS | {f"eval__evaluators__{name}__at": "never" for name in ("answers", "final_answers")}


def shared_data(name: str) -> pathlib.Path:
    """A file or directory beside the repository; skips the test if it does not exist."""
    path = ROOT.parent / "shared" / name
    if not path.exists():
        pytest.skip(f"there is no {path}")
    return path


def config_file(name: str, *arguments: str) -> ConfigDict:
    """Reads configs/<name>.py, or configs/<name>.py:<argument>."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


def tiny_dict(**overrides: Any) -> ConfigDict:
    """The tiny digits config, with overrides by dotted key (double underscores for dots)."""
    config = config_file("digits")
    for key, value in (TINY | {key.replace("__", "."): value for key, value in overrides.items()}).items():
        *sections, name = key.split(".")
        functools.reduce(lambda section, part: section[part], sections, config)[name] = value
    return config


def tiny_config(**overrides: Any) -> Config:
    return configuration.resolve(tiny_dict(**overrides))


def tiny_flags(**overrides: Any) -> list[str]:
    """The same as command-line flags of `lattejax.train`."""
    values = TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    text = {key: ",".join(map(repr, value)) if isinstance(value, tuple) else value for key, value in values.items()}
    return ["--config=configs/digits.py", *(f"--config.{key}={value}" for key, value in text.items())]


def encoder_for(config: Config) -> PromptEncoder:
    return prompt_encoder(config, tokenizers.train(DigitSource("captions").texts(), config.tokenizer.vocab_size))


def randomize(params: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Adds noise to every weight, so that nothing stays at zero or one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + scale * rng.standard_normal(x.shape).astype(x.dtype), params)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Two trees of arrays are equal bit for bit."""
    ours, theirs = jax.tree.leaves_with_path(ours), jax.tree.leaves_with_path(theirs)
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), f"{jax.tree_util.keystr(path)} differs"


def products(program: Jaxpr) -> Iterator[JaxprEqn]:
    """All matrix products and convolutions of a program and those inside it."""
    for equation in program.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield from products(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


@contextlib.contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """Yields a function that returns how many programs the block has compiled so far, including those from a cache."""
    counted = []

    def listen(event: str, seconds: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counted.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: len(counted)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# For the processes that tests start: they have no PyTorch, like most users.
PYTHONPATH = [str(ROOT / "tests" / "without_torch"), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(PYTHONPATH)}


def run_command(command: str, *arguments: str, **kwargs: Any) -> subprocess.CompletedProcess:
    """Runs `python -m lattejax.<command>` in the repository, like a user."""
    settings = dict(cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True)
    if "stdin" not in kwargs:
        settings["input"] = ""
    return subprocess.run([sys.executable, "-m", f"lattejax.{command}", *arguments], **settings | kwargs)


def start_command(command: str, *arguments: str, **kwargs: Any) -> subprocess.Popen:
    """Starts such a command, without waiting for its end."""
    return subprocess.Popen(
        [sys.executable, "-m", f"lattejax.{command}", *arguments], cwd=ROOT, env=ENVIRONMENT, **kwargs
    )


class Forks:
    """Runs commands as `run_command` and `start_command` do, without waiting for their imports."""

    def __init__(self, cwd: os.PathLike = ROOT, env: dict[str, str] | None = None):
        path = os.pathsep.join([*PYTHONPATH, str(ROOT)])
        self._settings = dict(cwd=cwd, env=ENVIRONMENT | (env or {}) | {"PYTHONPATH": path})
        self._server: subprocess.Popen | None = None

    def ask(self, *request: Any) -> Any:
        if self._server is None:
            command = [sys.executable, "-m", "tests.forked_commands"]
            pipe = subprocess.PIPE
            self._server = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, **self._settings)
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, command: str, *arguments: str, output: os.PathLike, env: dict[str, str] | None = None) -> "Fork":
        """Starts a command whose output and errors go to a file; `env` is added to the environment."""
        open(output, "w").close()
        return Fork(self, self.ask("start", command, arguments, [os.devnull, *[str(output)] * 2], env or {}))

    def __call__(
        self, command: str, *arguments: str, input: str = "", env: dict[str, str] | None = None
    ) -> types.SimpleNamespace:
        """Runs a command to its end; returns `returncode`, `stdout` and `stderr`."""
        with tempfile.TemporaryDirectory() as directory:
            files = [pathlib.Path(directory) / name for name in ("stdin", "stdout", "stderr")]
            files[0].write_text(input)
            code = self.ask("wait", self.ask("start", command, arguments, list(map(str, files)), env or {}))
            stdout, stderr = (file.read_text() for file in files[1:])
        return types.SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr)

    def close(self) -> None:
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()


@dataclasses.dataclass
class Fork:
    """A started command; like `subprocess.Popen`."""

    forks: Forks
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.forks.ask("poll", self.pid)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = self.forks.ask("wait", self.pid)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)


# ---- A signal during training


def run_interrupted(plan, *args, before_step: int):
    """Runs a stage; the second stage gets a signal just before the given step."""
    if plan.name == "train":
        plan = dataclasses.replace(plan, batches=InterruptingBatches(plan.batches, before_step))
    return run_stage(plan, *args)


class InterruptingBatches:
    """Batches, with a signal before the given batch."""

    def __init__(self, batches, at: int):
        self.batches, self.left = batches, at

    def __next__(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)
