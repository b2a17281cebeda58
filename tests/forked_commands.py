"""Runs each command in a fork of a process that has imported everything, because imports take most of a command's time.

Reads JSON requests, one per line, and answers each with a line. `start` forks, and answers with the pid; `poll` and
`wait` answer with the exit code, `poll` with null while the command runs.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
import warnings

for heavy in ("encoding.encode", "benchmarks.drawing", "sampling.answers", "sweeps.sweep"):
    importlib.import_module(f"lattejax.{heavy}")
MOST_SECONDS = 1200  # the longest tests' commands take minutes on slow cores
warnings.filterwarnings("ignore", "os.fork")  # nothing has been computed yet: there are no threads


def start(command: str, arguments: list[str], files: list[str], environment: dict[str, str]) -> int:
    """Forks; `files` are the paths of standard input, output and errors."""
    pid = os.fork()
    if pid:
        return pid
    modes = (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_APPEND] * 2)
    for stream, (path, mode) in enumerate(zip(files, modes, strict=True)):
        os.dup2(os.open(path, mode), stream)
    os.environ.update(environment)
    code = 0
    try:
        sys.argv = [command, *arguments]
        runpy.run_module(f"lattejax.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def wait(pid: int) -> int:
    """Kills a command that hangs, so that its test fails."""
    deadline = time.monotonic() + MOST_SECONDS
    while (code := poll(pid)) is None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return code


ANSWERS = {"start": start, "wait": wait, "poll": poll}

if __name__ == "__main__":
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(ANSWERS[name](*arguments)), flush=True)
