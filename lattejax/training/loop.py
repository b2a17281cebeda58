"""The training loop of one stage: its state, and when it is logged, saved and evaluated."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lattejax.configuration import Config, Profile, Stage
from lattejax.data.pipeline import Streams
from lattejax.errors import UserError
from lattejax.evaluation.protocol import Report
from lattejax.interrupts import Interrupted
from lattejax.models.functional import Params, parameter_count
from lattejax.parallel import hosts, memory, rules
from lattejax.parallel.rows import Rows
from lattejax.runs.checkpoints import Checkpoints
from lattejax.runs.workdir import Workdir
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.metrics import MetricsLog, RunClock
from lattejax.training.step import TrainState, abstract_state, compile_for, init_state, learning_rate


@dataclasses.dataclass(frozen=True)
class StageRecipe:
    """Everything that differs between the stages of training."""

    name: str
    settings: Stage
    mesh: Mesh
    rows: Mapping[str, Rows]  # of each stream of batches
    trained: Params  # shapes and dtypes of what is trained
    init: Callable[[], Params]  # initializes or loads the first weights
    step: Callable  # see `make_train_step`
    key: jax.Array
    frozen: Any  # read by every step, never trained
    batches: Streams
    evaluate: Callable[[TrainState], Report]
    flops_per_example: float  # in a training step, in closed form
    profile: Profile = Profile()

    def place(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Moves the rows of a batch that this process has read to its devices."""
        return {name: self.rows[name].place(self.mesh, stream) for name, stream in batch.items()}

    def abstract_batch(self) -> dict[str, Any]:
        """Describes a batch on the devices, before one is read."""
        example = self.batches.example()
        return {name: self.rows[name].abstract(self.mesh, stream) for name, stream in example.items()}


def run_stage(
    recipe: StageRecipe, config: Config, workdir: Workdir, clock: RunClock, guard: InterruptGuard
) -> TrainState:
    """Trains a stage to its last step, from its latest checkpoint if there is one, and returns its final state.

    A step is saved before it is evaluated: nothing is unsaved while an evaluation runs.

    Raises:
      Interrupted: on a signal; the state after a step that all processes agreed on is saved.
      UserError: too many steps were skipped, or no checkpoint can be read.
    """
    settings, keep = recipe.settings, config.checkpoint
    checkpoints = Checkpoints(workdir.checkpoints(recipe.name), keep=keep.keep, keep_every=keep.keep_every)
    abstract = abstract_state(settings, recipe.trained, recipe.mesh)
    available = memory.device_bytes(recipe.mesh.local_devices[0])
    memory.check_fits(memory.bytes_per_device(abstract), available, f"{recipe.name}: what is trained, on each device,")

    # ---- Where to start
    first_step, window = 0, Window()
    if checkpoints.steps:
        first_step, restored = checkpoints.restore_latest(**abstract.arrays)
        progress = restored.pop("progress")
        recipe.batches.set_state(progress["data"])
        window = Window.loaded(progress["window"])
        counts = np.asarray([first_step, progress["skipped"]], np.int32)
        counts = rules.put(tuple(counts), (abstract.step.sharding, abstract.skipped.sharding))
        state = TrainState(*counts, **({"ema": None} | restored))
    else:
        placed = jax.tree.map(lambda x: x.sharding, abstract)
        init = jax.jit(functools.partial(init_state, settings), out_shardings=placed, donate_argnums=0)
        state = init(recipe.init())

    def save(step: int) -> None:
        skipped = int(hosts.fetch(state.skipped))
        progress = {"data": recipe.batches.get_state(), "skipped": skipped, "window": window.dumped()}
        checkpoints.save(step, state.arrays, progress)
        guard.saved(finish)

    def finish() -> None:
        checkpoints.wait()
        log.flush()

    log = MetricsLog(workdir, clock, recipe.name, first_step, settings.steps)
    if settings.steps == 0 and not checkpoints.steps:
        save(0)  # a stage of no steps passes on its initial weights

    # ---- The steps
    log.print(
        f"{recipe.name}: {parameter_count(state.params):,} trained parameters, steps {first_step} to {settings.steps}"
    )
    train_step = compile_for(recipe.mesh, recipe.step, state, recipe.frozen, recipe.rows)
    key = rules.put(recipe.key, rules.replicated(recipe.mesh))
    if first_step < settings.steps:
        train_step = train_step.lower(state, recipe.frozen, recipe.abstract_batch(), key).compile()
        memory.check_compiled(train_step, f"a step with config.{recipe.name}.batch_size={settings.batch_size}")
    rate, stop = learning_rate(settings), Stop(guard, recipe.mesh)
    skipped_before = int(hosts.fetch(state.skipped)) - len(window.skipped())  # those already logged

    def is_evaluated(step: int) -> bool:
        return step == settings.steps or bool(config.eval.every and step % config.eval.every == 0)

    def evaluate(step: int) -> None:
        report = recipe.evaluate(state)
        for name, picture in report.pictures.items():
            log.image(step, name, picture)
        log.write(step, report.figures)
        best = log.best_step(keep.best, checkpoints.steps)
        checkpoints.keep_step(best)
        if recipe.name == "train" and keep.best and best is None:
            names = ", ".join(name for name, value in report.figures.items() if np.ndim(value) == 0)
            log.print(f"config.checkpoint.best={keep.best!r}: no evaluation has this figure yet; this one has {names}")

    trace = Trace(recipe.profile, workdir.path / "profile")
    checkpoints.keep_step(log.best_step(keep.best, checkpoints.steps))
    if first_step and is_evaluated(first_step) and not log.has_evaluation(first_step):
        evaluate(first_step)  # an earlier process stopped before it
    window.start()
    for step in range(first_step + 1, settings.steps + 1):
        last = step == settings.steps
        trace.start(step)
        window.start_waiting()
        batch = recipe.place(next(recipe.batches))
        window.stop_waiting()
        guard.unsaved()
        state, metrics = train_step(state, recipe.frozen, batch, key)
        window.add(step, metrics)
        log.advance()

        if trace.is_last(step):
            jax.block_until_ready(state)
            trace.stop()
        if step % config.log_every == 0 or last:
            means, skipped, timing = window.close(settings.batch_size, recipe.flops_per_example)
            remarks = {"skipped_records": {n: recipe.batches.records(n - 1) for n in skipped}} if skipped else {}
            skipped_before += len(skipped)
            log.write(step, means | {"learning_rate": rate(step - 1 - skipped_before)} | timing, **remarks)
            for n, records in remarks.get("skipped_records", {}).items():
                log.print(f"{recipe.name} {n}: skipped, loss or gradient is not finite; {first_few(records)}")
            if skipped_before > config.most_skipped_steps:
                trace.stop()
                checkpoints.close()
                raise UserError(
                    f"{recipe.name}: {skipped_before} steps until step {step} had a loss or a gradient that is not "
                    f"finite, more than config.most_skipped_steps={config.most_skipped_steps}; {workdir.metrics} names "
                    f"their records; the last checkpoint, if any, is of step {checkpoints.latest_step}"
                )
        asked = stop()
        if is_evaluated(step) or step % keep.every == 0 or asked:
            save(step)
        if asked and not last:
            trace.stop()
            checkpoints.close()
            log.close()
            raise Interrupted(guard.signum)
        if is_evaluated(step):
            with window.excluded():
                evaluate(step)
    trace.stop()
    checkpoints.close()
    log.close()
    guard.saved()
    return state


class Stop:
    """Whether to stop after this step: the same answer on every process, whichever received the signal.

    No process of several may stop alone. So each shares its signal with the others, in a tiny computation beside the
    step, and reads the result two steps later, when reading it no longer waits for a device.
    """

    LAG = 2

    def __init__(self, guard: InterruptGuard, mesh: Mesh):
        self._guard, self._answers = guard, collections.deque()
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=rules.replicated(mesh))

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return self._guard.signum is not None
        own = np.full(self._each.mesh.size, self._guard.signum or 0, np.int32)
        signals = jax.make_array_from_callback(own.shape, self._each, lambda index: own[index])
        self._answers.append(self._any(signals))
        if len(self._answers) <= self.LAG:
            return False
        answer = int(self._answers.popleft())
        if answer:
            self._guard.signum = answer
        return bool(answer)


class Trace:
    """The profiler's record of the chosen steps; of those that are left, if the run resumes among them."""

    def __init__(self, profile: Profile, directory: epath.Path):
        self._steps, self._directory = range(profile.start, profile.start + profile.steps), directory
        self._is_running = False

    def start(self, step: int) -> None:
        """Starts the record, before the first of its steps that this process takes."""
        if step in self._steps and not self._is_running:
            jax.profiler.start_trace(str(self._directory))
            self._is_running = True

    def is_last(self, step: int) -> bool:
        return self._is_running and step + 1 not in self._steps

    def stop(self) -> None:
        """Writes the record, if there is one that is not written yet."""
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running = False


class Window:
    """The steps since the last line of metrics: their means and rates. Only `close` waits for the device.

    Means are over all of its steps, rates and waiting over those of this process: nobody knows how long an earlier one
    took for the steps that it saved.
    """

    def __init__(self):
        self._open()

    def _open(self) -> None:
        self._metrics: dict[int, dict[str, jax.Array | np.ndarray]] = {}
        self._restored = 0  # of its steps, those of an earlier process
        self._waited = 0.0
        self.start()

    def start(self) -> None:
        """Counts the time from now on."""
        self._started = time.perf_counter()

    def start_waiting(self) -> None:
        self._wait_started = time.perf_counter()

    def stop_waiting(self) -> None:
        self._waited += time.perf_counter() - self._wait_started

    def dumped(self) -> dict[str, dict[str, Any]]:
        """Its metrics as JSON, for a run that resumes in the middle of a window."""
        fetched = hosts.fetch(self._metrics)
        return {str(step): {name: x.tolist() for name, x in metrics.items()} for step, metrics in fetched.items()}

    @classmethod
    def loaded(cls, values: dict[str, dict[str, Any]]) -> "Window":
        """Restores a window from its `dumped` metrics."""
        window = cls()
        for step, metrics in values.items():
            window.add(int(step), {name: np.asarray(value, np.float32) for name, value in metrics.items()})
        window._restored = len(values)
        return window

    def skipped(self) -> list[int]:
        """Which of its steps were skipped; waits for the device."""
        return [step for step, metrics in hosts.fetch(self._metrics).items() if metrics["skipped"]]

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Excludes the time in this context from the training time."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def add(self, step: int, metrics: dict[str, jax.Array | np.ndarray]) -> None:
        self._metrics[step] = metrics

    def close(
        self, batch_size: int, flops_per_example: float
    ) -> tuple[dict[str, np.ndarray | np.floating], list[int], dict[str, float]]:
        """Returns the means over the window's steps without the skipped ones, the skipped steps, and rates; opens the
        next window.

        Args:
          batch_size: images in a step.
          flops_per_example: the FLOPs of training on an image, in closed form.
        """
        fetched = hosts.fetch(self._metrics)
        skipped = [step for step, metrics in fetched.items() if metrics.pop("skipped")]
        finite = [metrics for step, metrics in fetched.items() if step not in skipped]
        means = {name: np.mean([metrics[name] for metrics in finite], axis=0) for name in finite[0]} if finite else {}
        timed = len(fetched) - self._restored
        images_per_second = timed * batch_size / (time.perf_counter() - self._started)
        timing = {
            "skipped_steps": len(skipped),
            "images_per_second": images_per_second,
            "data_wait_seconds": self._waited,
            "model_flops_per_second": images_per_second * flops_per_example,
        }
        self._open()
        return means, skipped, timing


def first_few(records: dict[str, list[int]], most: int = 8) -> str:
    """Lists the first few of each stream's records."""
    return "; ".join(
        f"{name}: records {', '.join(map(str, indices[:most]))}{', …' * (len(indices) > most)}"
        for name, indices in records.items()
    )
