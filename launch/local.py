"""Runs a command as several processes on this machine, as a cluster runs it on several machines:

python launch/local.py --processes=2 lattejax.train --config=configs/digits.py --workdir=runs/digits

Where one process ends, the others are ended too. As long as they end with 75 (the machine was wanted back, everything
is saved) they are started again, --retries times.
"""

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import time

TRY_AGAIN = 75
SECONDS_TO_SAVE = 120


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many")
    parser.add_argument("--retries", type=int, default=0, help="how often to start again after exit code 75")
    parser.add_argument("command", help="lattejax.train or lattejax.sample")
    arguments, flags = parser.parse_known_args()
    asked = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: asked.append(signum))
    for _ in range(arguments.retries + 1):
        code = run(arguments.command, flags, arguments.processes, asked)
        if code != TRY_AGAIN or asked:
            break
    return code


def run(module: str, flags: list[str], count: int, asked: list[int]) -> int:
    """Runs all processes to their end; returns the first exit code that is not 0. What this process is asked by signal
    it passes on."""
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", module, *flags, "--cluster=explicit", coordinator, f"--processes={count}"]
    # In sessions of their own, so that Ctrl-C on a terminal reaches them through this process alone, and once: a second
    # signal would stop them before they have saved.
    processes = [subprocess.Popen([*command, f"--process={number}"], start_new_session=True) for number in range(count)]
    first_failure, deadline = 0, float("inf")
    while None in [process.poll() for process in processes]:
        time.sleep(0.05)
        failed = [process.returncode for process in processes if process.returncode]
        if failed and not first_failure:
            first_failure = failed[0] if failed[0] > 0 else 128 - failed[0]
        if (first_failure or asked) and deadline == float("inf"):
            deadline = time.monotonic() + SECONDS_TO_SAVE
            send(processes, asked[0] if asked else signal.SIGTERM)
        if time.monotonic() > deadline:
            send(processes, signal.SIGKILL)
    failed = [process.returncode for process in processes if process.returncode]
    return first_failure or (failed[0] if failed else 0)


def send(processes: list[subprocess.Popen], signum: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signum)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
