"""Runs a command as several processes on this machine, as a cluster would on several machines:

python launch/local.py --processes=2 lattejax.train --config=configs/digits.py --workdir=runs/digits

If one process fails, the others are stopped too. If they exit with 75 (preempted, everything is saved), they are
restarted, at most --retries times.
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
    parser.add_argument("--processes", type=int, default=2, help="the number of processes")
    parser.add_argument("--retries", type=int, default=0, help="how often to restart after exit code 75")
    parser.add_argument("command", help="lattejax.train or lattejax.sample")
    arguments, flags = parser.parse_known_args()
    if arguments.processes < 1 or arguments.retries < 0:
        parser.error("--processes must be at least 1, and --retries at least 0")
    signals = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: signals.append(signum))
    for _ in range(arguments.retries + 1):
        code = run(arguments.command, flags, arguments.processes, signals)
        if code != TRY_AGAIN or signals:
            break
    return code


def run(module: str, flags: list[str], count: int, signals: list[int]) -> int:
    """Runs all processes to their end, and forwards the signals that this process receives; returns the first non-zero
    exit code."""
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", module, *flags, "--cluster=explicit", coordinator, f"--processes={count}"]
    # In new sessions, so that Ctrl-C on a terminal reaches them only through this process, and only once: a second
    # signal would stop them before they have saved.
    processes = [subprocess.Popen([*command, f"--process={i}"], start_new_session=True) for i in range(count)]
    first_failure, deadline = 0, float("inf")
    while None in [process.poll() for process in processes]:
        time.sleep(0.05)
        failed = [process.returncode for process in processes if process.returncode]
        if failed and not first_failure:
            first_failure = failed[0] if failed[0] > 0 else 128 - failed[0]
        if (first_failure or signals) and deadline == float("inf"):
            deadline = time.monotonic() + SECONDS_TO_SAVE
            send(processes, signals[0] if signals else signal.SIGTERM)
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
