"""The training loop of one stage: what changes over time, and when it is logged, evaluated and saved."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lattejax.configuration import Config, Profile, Stage
from lattejax.models.functional import Params
from lattejax.training.interrupt import Interrupted, InterruptGuard
from lattejax.training.metrics import MetricsLog, RunClock
from lattejax.training.step import TrainState, init_state, learning_rate
from lattejax.weights.checkpoints import Checkpoints
from lattejax.weights.runs import Workdir


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Everything that tells one stage of training from another."""

    name: str
    settings: Stage
    abstract: Params  # shapes and dtypes of what is trained
    init: Callable[[], Params]  # draws or loads the first weights
    step: Callable  # see `make_train_step`
    key: jax.Array
    frozen: Any  # read by every step, trained by none
    batches: Any  # an iterator with `get_state` and `set_state`
    evaluate: Callable[[TrainState, MetricsLog], dict[str, Any]]
    flops_per_example: float  # of a training step, in closed form
    profile: Profile = Profile(start=0, steps=0)


def run_stage(plan: StagePlan, config: Config, workdir: Workdir, clock: RunClock, guard: InterruptGuard) -> TrainState:
    """Trains a stage to its last step, from its latest checkpoint if there is one, and returns its final state.

    Raises:
      Interrupted: a signal came; the state after the step under way is saved.
    """
    settings = plan.settings
    checkpoints = Checkpoints(workdir.checkpoints(plan.name), keep=config.checkpoint.keep)

    # ---- Where to start
    first_step = checkpoints.latest_step or 0
    if first_step:
        abstract = jax.eval_shape(functools.partial(init_state, settings), plan.abstract)
        arrays = {name: getattr(abstract, name) for name in ("params", "ema", "optimizer")}
        restored = checkpoints.restore(first_step, **arrays)
        plan.batches.set_state(restored.pop("progress")["data"])
        state = TrainState(step=jnp.asarray(first_step, jnp.int32), **restored)
    else:
        state = jax.jit(functools.partial(init_state, settings))(plan.init())

    def save(step: int) -> None:
        arrays = {"params": state.params, "ema": state.ema, "optimizer": state.optimizer}
        checkpoints.save(step, arrays, {"data": plan.batches.get_state()})

    if settings.steps == 0 and checkpoints.latest_step is None:
        save(0)  # a stage of no steps hands on what it starts from

    # ---- The steps
    log = MetricsLog(workdir, clock, plan.name, first_step, settings.steps)
    log.say(f"{plan.name}: {count(state.params):,} trained parameters, steps {first_step} to {settings.steps}")
    train_step = jax.jit(plan.step, donate_argnums=0)
    rate = learning_rate(settings)
    window = Window()
    for step in range(first_step + 1, settings.steps + 1):
        last = step == settings.steps
        if plan.profile.steps and step == plan.profile.start:
            jax.profiler.start_trace(str(workdir.path / "profile"))

        window.start_waiting()
        batch = next(plan.batches)
        window.stop_waiting()
        state, metrics = train_step(state, plan.frozen, batch, plan.key)
        window.add(metrics)
        log.advance()

        if plan.profile.steps and step == plan.profile.start + plan.profile.steps - 1:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
        if step % config.log_every == 0 or last:
            means, timing = window.close(settings.batch_size, plan.flops_per_example)
            log.write(step, means | {"learning_rate": rate(step - 1)} | timing)
        if last or (config.eval.every and step % config.eval.every == 0):
            log.write(step, plan.evaluate(state, log))
            window = Window()
        if last or step % config.checkpoint.every == 0 or guard.signum is not None:
            save(step)
        if guard.signum is not None and not last:
            checkpoints.close()
            log.close()
            raise Interrupted(guard.signum)
    checkpoints.close()
    log.close()
    return state


class Window:
    """The steps since the last line of metrics: their means and rates. Nothing waits for the device until `close`."""

    def __init__(self):
        self._metrics: list[dict[str, jax.Array]] = []
        self._started = time.perf_counter()
        self._waited = 0.0

    def start_waiting(self) -> None:
        self._wait_started = time.perf_counter()

    def stop_waiting(self) -> None:
        self._waited += time.perf_counter() - self._wait_started

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._metrics.append(metrics)

    def close(self, batch_size: int, flops_per_example: float) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Returns means over the window's steps, and its rates; a new window begins."""
        fetched = jax.device_get(self._metrics)
        means = {name: np.mean([metrics[name] for metrics in fetched], axis=0) for name in fetched[0]}
        images_per_second = len(fetched) * batch_size / (time.perf_counter() - self._started)
        timing = {
            "images_per_second": images_per_second,
            "data_wait_seconds": self._waited,
            "model_flops_per_second": images_per_second * flops_per_example,
        }
        self.__init__()
        return means, timing


def count(params: Params) -> int:
    """Numbers in a tree of weights."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
