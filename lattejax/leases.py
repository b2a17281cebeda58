"""One writer at a time: a lease on what is written, which its holder renews.

On one host, the lease of a killed process counts for nothing, and neither does one from before a reboot. Processes of
other hosts, which share a network disk, watch whether it is renewed. Object stores have no leases.
"""

import contextlib
import datetime
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from lattejax.errors import UserError

LEASE, HOLDER = ".lease", ".holder"  # suffixes of two files: the lease, and a description of its holder
# Processes must agree on these two, also of different versions.
SECONDS = 12.0  # without a renewal, after which another host's lease is over
RENEWALS = 4  # in that time


@contextlib.contextmanager
def one_writer(
    path: os.PathLike, name: str, end_others: Callable[[int, str], None] = lambda code, reason: None
) -> Iterator[None]:
    """Holds a lease on a local or network disk; creates its directory.

    Args:
      path: where the lease is kept, without suffix.
      name: what is written, for messages.
      end_others: ends this process's companions, given an exit code and the reason, if the lease is lost.

    Raises:
      UserError: another process holds it.
    """
    if "://" in os.fspath(path):
        yield
        return
    file, holder = Path(f"{os.fspath(path)}{LEASE}"), Path(f"{os.fspath(path)}{HOLDER}")
    created = not file.parent.exists()
    file.parent.mkdir(parents=True, exist_ok=True)

    def end_process(compromise: LeaseCompromise) -> None:
        """Two writers would destroy each other's work."""
        reason = f"the lease {file} is lost ({compromise.reason})"
        print(f"error: {reason}; stopping", file=sys.stderr, flush=True)
        end_others(2, reason)
        os._exit(2)

    lease = SoftFileLease(
        file, lease_duration=SECONDS, heartbeat_interval=SECONDS / RENEWALS, on_compromise=end_process
    )
    try:
        _acquire(lease, holder, name)
    except Timeout:
        known = _read(holder)
        raise UserError(
            f"{name} is being written by process {known['process']} on {known['host']} since {known['since']}; wait "
            "for its end, or stop it"
        ) from None
    try:
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        values = {"host": socket.gethostname(), "process": os.getpid(), "since": since, "machine": _machine()}
        holder.write_text(json.dumps(values) + "\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lease.release()
        with contextlib.suppress(OSError):  # nothing was written
            if created:
                file.parent.rmdir()


def _acquire(lease: SoftFileLease, holder: Path, name: str) -> None:
    """Takes the lease. Waits only for a holder on another host, because this host cannot know whether it lives."""
    try:
        lease.acquire(timeout=0.5)
    except Timeout:
        known = _read(holder)
        if known["machine"] == _machine():
            raise
        print(
            f"{name} may be being written by process {known['process']} on {known['host']}; waiting {SECONDS:.0f} "
            "seconds for its renewal",
            file=sys.stderr,
            flush=True,
        )
        lease.acquire(timeout=SECONDS * (1 + 1 / RENEWALS))


def _read(holder: Path) -> dict[str, str]:
    """The description of a holder, as far as it is known."""
    known = {"host": "an unknown host", "process": "?", "since": "an unknown time", "machine": None}
    with contextlib.suppress(OSError, ValueError):  # it has just released the lease, or was killed while writing
        known |= json.loads(holder.read_text())
    return known


def _machine() -> list[str]:
    """Identifies the host since its start, and the container."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        known += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return known
