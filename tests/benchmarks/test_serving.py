"""The load on a server: arrivals by the seed, latencies from when requests are due, and errors that are counted."""

import dataclasses
import functools
import http.server
import math
import threading

import pytest

from lattejax.benchmarks import serving as load
from lattejax.errors import UserError
from tests.serving.serving import LIMITS, make_service, serving


def settings(url, **changes):
    given = dict(key="", rate=20, clients=2, seconds=1, steps=2, guidance=2.0, new_tokens=3, seed=0)
    return load.Load(url, **given | changes)


def test_arrivals_are_a_seeded_poisson_process():
    found = load.arrivals(rate=5, seconds=2000, seed=1)
    assert found == load.arrivals(5, 2000, 1) != load.arrivals(5, 2000, 2)
    times = [time for time, _ in found]
    gaps = [after - before for before, after in zip([0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 5, rel=0.05), "within five standard deviations"
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert spread == pytest.approx(mean, rel=0.08)
    assert 0.45 < sum(kind == "chat" for _, kind in found) / len(found) < 0.55


def test_latencies_and_rates_of_a_server():
    service = make_service(dataclasses.replace(LIMITS, queue=100, queue_seconds=600))
    service.model.card["prompts"] = ["a two", "a seven"]
    with serving(service, api_key="a key") as url:
        with pytest.raises(UserError, match="answers 401"):
            load.Client(settings(url))
        found = load.serve(settings(url, key="a key"), "", 16, 1)
    assert found["requests"] > 5 and found["refused_or_failed"] == 0
    for name in ("image_seconds", "first_picture_seconds", "chat_seconds", "first_token_seconds"):
        assert 0 < found[f"{name}_p50"] <= found[f"{name}_p90"] <= found[f"{name}_p99"]
    assert found["first_picture_seconds_p50"] <= found["image_seconds_p50"]
    assert found["pictures_per_second"] > 0 and found["tokens_per_second"] > 0


def test_another_server_is_one_line(tmp_path):
    (tmp_path / "card").write_text("<html>hello</html>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for card, named in (("<html>", "/card is not valid JSON"), ("{}", "another server: its /card has no prompts")):
            (tmp_path / "card").write_text(card)
            with pytest.raises(UserError, match=named):
                load.Client(settings(f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1", "ftp://a", "http://[::1"])
def test_a_url_without_a_server_is_one_line(url):
    with pytest.raises(UserError, match="--url="):
        load.Client(settings(url))
