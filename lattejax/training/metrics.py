"""Metrics output: `metrics.jsonl`, TensorBoard, and the terminal."""

import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epy
from PIL import Image
from tqdm import tqdm

from lattejax.files import write_atomically, write_with
from lattejax.parallel import hosts
from lattejax.runs.records import best_step, read_records
from lattejax.runs.workdir import Workdir

with epy.lazy_imports():
    from tensorboardX import event_file_writer, record_writer, summary
    from tensorboardX.proto import event_pb2


class RunClock:
    """Seconds of work on a run, including earlier processes up to their last line of metrics."""

    def __init__(self, workdir: Workdir):
        self._before = max((record["seconds"] for record in read_records(workdir.metrics)), default=0.0)
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started


class MetricsLog:
    """One stage's metrics.

    `metrics.jsonl` is rewritten completely each time, because remote stores cannot append. A resumed run first drops
    the lines after the checkpoint that it resumes from. Only the first of several processes writes and prints.
    """

    def __init__(self, workdir: Workdir, clock: RunClock, stage: str, first_step: int, last_step: int):
        self._workdir, self._clock, self._stage, self._last_step = workdir, clock, stage, last_step
        self._last_line = first_step, time.perf_counter()
        records = read_records(workdir.metrics)
        self._records = [r for r in records if r["stage"] != stage or r["step"] <= first_step]
        self._tensorboard = self._bar = None
        if not hosts.is_first():
            return
        self._tensorboard = EventFile(os.fspath(workdir.tensorboard(stage)), first_step + 1)
        if sys.stderr.isatty():
            self._bar = tqdm(total=last_step, initial=first_step, desc=stage, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Advances the progress bar by a step."""
        if self._bar is not None:
            self._bar.update()

    def has_evaluation(self, step: int) -> bool:
        """Whether an evaluation at this step is recorded."""
        own = (record for record in self._records if record["stage"] == self._stage and record["step"] == step)
        return any("learning_rate" not in record for record in own)

    def best_step(self, best: str, steps: Iterable[int]) -> int | None:
        """See `records.best_step`."""
        return best_step(self._records, best, steps)

    def write(self, step: int, metrics: dict[str, Any], **remarks: Any) -> None:
        """Records metrics: scalars, and vectors with an entry for each group. Remarks go only to the file."""
        metrics = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        record = {"stage": self._stage, "step": step, "seconds": self._clock.seconds} | metrics | remarks
        self._records.append(record)
        if self._tensorboard is None:
            return
        write_atomically(self._workdir.metrics, "".join(json.dumps(r) + "\n" for r in self._records).encode())
        for name, value in metrics.items():
            by_group = {f"{name}/{group}": item for group, item in enumerate(value)} if isinstance(value, list) else {}
            for curve, item in (by_group or {name: value}).items():
                self._tensorboard.write(step, summary=summary.scalar(curve, item))
        self.print(f"{self._stage} {step} of {self._last_step}: {self._summary(step, metrics)}")

    def _summary(self, step: int, metrics: dict[str, Any]) -> str:
        """What a line shows of metrics: of an evaluation all; of training the losses, the rate and the time left."""
        if "images_per_second" not in metrics:
            return ", ".join(f"{name} {_short(value)}" for name, value in metrics.items())
        shown = [f"{name} {_short(value)}" for name, value in metrics.items() if "loss" in name]
        now = time.perf_counter()
        seconds_per_step = (now - self._last_line[1]) / max(1, step - self._last_line[0])
        self._last_line = step, now
        left = datetime.timedelta(seconds=round(seconds_per_step * (self._last_step - step)))
        return ", ".join([*shown, f"{metrics['images_per_second']:.4g} images/s, {left} left"])

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Writes an image as PNG, and shows it in TensorBoard."""
        if self._tensorboard is None:
            return
        write_with(self._workdir.image(name, self._stage, step), lambda file: image.save(file, format="PNG"))
        self._tensorboard.write(step, summary=summary.image(name, np.asarray(image), dataformats="HWC"))

    def print(self, line: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        elif self._tensorboard is not None:
            print(line, flush=True)

    def flush(self) -> None:
        """Writes what TensorBoard has been given so far; from any thread, also after `close`."""
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._bar is not None:
            self._bar.close()


class EventFile:
    """A TensorBoard file of events, written by the thread that calls, so that an error is raised there. The thread of
    tensorboardX's own `SummaryWriter` ends with an error, and whoever writes next waits for it for ever."""

    SECONDS = 120  # between flushes, each of which sends the whole file to a remote store

    def __init__(self, directory: str, first_step: int):
        """What an earlier process wrote of `first_step` and later is no longer shown."""
        record_writer.directory_check(directory)
        self._file = event_file_writer.EventsWriter(os.path.join(directory, "events"))
        self._flushed, self._is_closed, self._lock = 0.0, False, threading.Lock()
        self.write(first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, **what: Any) -> None:
        """Writes an event with one part, by its name in TensorBoard's format."""
        self._file.write_event(event_pb2.Event(step=step, wall_time=time.time(), **what))
        if time.monotonic() - self._flushed > self.SECONDS:
            self.flush()

    def flush(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with self._lock:
            self._file.close()
            self._is_closed = True


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join(_short(item) for item in value) + "]"
    return f"{value:.4g}"
