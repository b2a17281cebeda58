"""Stopping on request: by signals, even while Python is busy, and by preemption notices."""

import http.server
import signal
import subprocess
import sys
import threading
import time

import pytest

from lattejax.errors import parsing
from lattejax.interrupts import Interrupted
from lattejax.training import interrupt
from lattejax.training.interrupt import InterruptGuard
from tests.helpers import ENVIRONMENT, ROOT

# Its main thread is in one C call, as while XLA compiles: Python's signal handlers have to wait.
BUSY = """
import hashlib, sys, time
from lattejax.training.interrupt import InterruptGuard

def finish():
    print("the pending write is finished", flush=True)

with InterruptGuard(at_once=True) as guard:
    if sys.argv[1] == "unsaved":
        guard.unsaved()
    else:
        guard.saved(finish)
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**6 if sys.argv[1] == "unsaved" else 10**9)
    while guard.signum is None:
        time.sleep(0.01)
    print("saving", flush=True)
    guard.saved(finish)
    time.sleep(3600)
"""


@pytest.mark.parametrize("state", ["saved", "unsaved"])
@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_process_as_soon_as_nothing_is_unsaved(state, signum, code):
    command = [sys.executable, "-c", BUSY, state]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=-1, stderr=-1) as process:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signum)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == "saving\n" * (state == "unsaved") + "the pending write is finished\n"
    assert f"stopped by {signum.name}; run the same command again" in errors


def test_a_signal_while_a_library_parses_is_no_error_of_the_file():
    with pytest.raises(Interrupted), parsing("the tokenizer"):
        raise Interrupted(signal.SIGTERM)


def test_a_preemption_notice_counts_as_sigterm(monkeypatch):
    """Once the URL answers TRUE, and not before."""
    monkeypatch.setattr(interrupt, "SECONDS_BETWEEN_NOTICES", 0.05)
    answers, requests = [b"FALSE"], []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.headers["Metadata-Flavor"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[0])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with InterruptGuard(notice=f"http://127.0.0.1:{server.server_port}/preempted") as guard:
            wait_until(lambda: len(requests) > 2)
            assert guard.signum is None
            answers[0] = b"TRUE\n"
            wait_until(lambda: guard.signum is not None)
        server.shutdown()
    assert guard.signum == signal.SIGTERM and set(requests) == {"Google"}
    assert Interrupted(guard.signum).exit_code == 75


def test_without_a_metadata_server_training_continues_with_a_warning(capsys):
    with InterruptGuard(notice="http://127.0.0.1:9/preempted") as guard:
        wait_until(lambda: "cannot read a preemption notice from http://127.0.0.1:9" in capsys.readouterr().err)
        assert guard.signum is None


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
