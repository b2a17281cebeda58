"""Figures about the server, as Prometheus collects them."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All figures of one server; the methods may be called from any thread."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "lattejax"}
        self._requests = Counter("requests", "Requests, by endpoint and status.", ("endpoint", "status"), **own)
        self._latency = Histogram(
            "request_seconds", "From a request to the end of its response.", ("endpoint",), buckets=SECONDS, **own
        )
        self._first = Histogram(
            "first_seconds", "From a request to its first token or picture.", ("endpoint",), buckets=SECONDS, **own
        )
        self._steps = Histogram("step_rows", "Pictures that share a step.", ("group",), buckets=ROWS, **own)
        self._tokens = Counter("answer_tokens", "Tokens of answers.", **own)
        self._read = Counter("prompt_tokens", "Tokens of chats' prompts.", ("kept",), **own)
        self._running = Gauge("requests_running", "Requests that the engine works on.", **own)
        self._waiting = Gauge("requests_waiting", "Requests in the queue.", **own)

    def watch(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Asks these functions whenever figures are collected."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)

    def responded(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(endpoint, status).inc()
        self._latency.labels(endpoint).observe(seconds)

    def first(self, endpoint: str, seconds: float) -> None:
        self._first.labels(endpoint).observe(seconds)

    def stepped(self, group: int, rows: int) -> None:
        self._steps.labels(group).observe(rows)

    def decoded(self) -> None:
        self._tokens.inc()

    def read(self, tokens: int, kept: int) -> None:
        self._read.labels("no").inc(tokens)
        self._read.labels("yes").inc(kept)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)
