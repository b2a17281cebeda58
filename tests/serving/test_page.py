"""The page, in Debian's Chromium: apt-get install chromium; python -m pytest -m browser."""

import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from lattejax.runs.run import Run
from lattejax.serving import server
from lattejax.serving.limits import Limits
from tests.serving.serving import serving

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def served(earlier):
    limits = Limits(images_per_request=4, pictures=4, batch_size=4, conversations=2, context_tokens=512)
    service, compile_all = server.make_service(Run.open(earlier / "run"), "tiny", limits, "runs/tiny")
    compile_all(lambda what: None)
    with serving(service, api_key="") as url:
        yield service, url


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    if (chromium := shutil.which("chromium")) is None:
        pytest.fail("there is no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser, served):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(served[1])
    page.wait_for_selector("#ideas button")
    yield page
    assert [text for text in wrong if not re.search("status of|net::ERR_FAILED$", text)] == [], (
        "nothing fails, and nothing is fetched from elsewhere"
    )
    context.close()


def draw(page, prompt="a handwritten seven", **settings):
    page.fill("#prompt", prompt)
    for name, value in settings.items():
        page.fill(f"#{name}", str(value))
    page.press("#prompt", "Enter")
    page.wait_for_selector("#command:not([hidden])")


def test_it_offers_the_runs_own_sampling(page, served):
    usual, names = served[0].model.sampling, ("steps", "guidance", "shift")
    assert [float(page.input_value(f"#{name}")) for name in names] == [usual.num_steps, usual.guidance, usual.shift]


def test_it_draws_a_seven_and_asks_about_it(page):
    draw(page, count=3, steps=6, seed=5, guidance=3)
    assert page.locator("#pictures img").count() == 3
    assert page.text_content("#drawing-status") == "Seed 5"
    page.click("#command button")
    command = page.evaluate("() => navigator.clipboard.readText()")
    flags = "--workdir=runs/tiny --prompt='a handwritten seven' --num=3 --steps=6 --guidance=3 --shift=1 --seed=5"
    assert command == f"python -m lattejax.sample {flags}"
    page.click("#pictures button:nth-child(2)")
    page.click("#ask-about")
    page.fill("#question", "Which digit is this?")
    page.press("#question", "Enter")
    page.wait_for_selector(".assistant:not(.working)")
    page.fill("#question", "Is it even?")
    page.click("#send")
    page.wait_for_selector("li:nth-child(4):not(.working)")
    assert page.locator(".user img").count() == 1 and page.locator(".turns li").count() == 4


def test_the_bar_shows_which_expert_is_at_work(page, served, monkeypatch):
    drawings = served[0].engine._drawings
    original = drawings.step
    monkeypatch.setattr(drawings, "step", lambda: (time.sleep(0.2), original()))
    page.fill("#prompt", "a two")
    page.fill("#steps", "10")
    page.click("#go")
    for expert in (1, 2):
        page.wait_for_selector(f"#experts > div:nth-child({expert}).at-work")
        assert re.match(f"Expert {expert} of 2", page.text_content("#drawing-status"))
    assert page.locator("#pictures img").count() == 4, "previews of the first group"
    page.click("#go")
    page.wait_for_selector("text=Stopped")


def test_it_survives_a_reload_and_an_error(page):
    draw(page, prompt="it's a two", steps=3, count=1)
    assert r"--prompt='it'\''s a two'" in page.text_content("#command code")
    page.reload()
    page.wait_for_selector("#ideas button")
    assert page.input_value("#prompt") == "it's a two" and page.input_value("#steps") == "3"
    page.fill("#prompt", "seven " * 100)
    page.click("#go")
    page.wait_for_selector("#drawing-status.bad")
    assert "at most 64 can be drawn" in page.text_content("#drawing-status")
    draw(page)
    assert page.locator("#drawing-status.bad").count() == 0


def test_it_says_when_the_server_is_gone_and_keeps_the_question(page):
    page.click("text=Ask")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#question", "Is anybody there?")
    page.press("#question", "Enter")
    page.wait_for_selector("#asking-status.bad")
    assert "does not answer" in page.text_content("#asking-status")
    assert page.input_value("#question") == "Is anybody there?" and page.locator(".turns li").count() == 0


def test_a_new_chat_during_an_answer_begins_without_it(page, served, monkeypatch):
    chats = served[0].engine._chats
    original = chats.step
    monkeypatch.setattr(chats, "step", lambda: (time.sleep(0.2), original()))
    page.click("text=Ask")
    page.fill("#question", "Which digit is this?")
    page.press("#question", "Enter")
    page.wait_for_selector(".assistant:not(:empty)")
    page.click("#new")
    page.wait_for_selector("#send:text-is('Ask')")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.fill("#question", "Is it even?")
        page.press("#question", "Enter")
    assert [message["content"][0]["text"] for message in asked.value.post_data_json["messages"]] == ["Is it even?"]
    page.click("#send")


def test_an_image_is_dropped_chosen_and_removed(page, tmp_path):
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "a.png")
    page.click("text=Ask")
    page.set_input_files("#file", tmp_path / "a.png")
    page.wait_for_selector(".attached img")
    page.click(".attached button")
    assert page.locator(".attached img").count() == 0


def test_it_works_by_keyboard_and_fits_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 640})
    for section in ("draw", "ask", "model"):
        page.goto(page.url.partition("#")[0] + f"#{section}")
        page.wait_for_selector(f"#{section}")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360, section
    page.goto(page.url.partition("#")[0] + "#draw")
    page.focus("nav a >> nth=0")
    for key in ("Tab", "Tab", "Tab"):
        page.keyboard.press(key)
    assert page.evaluate("() => document.activeElement.id") == "prompt"
    page.keyboard.type("a two")
    page.keyboard.press("Enter")
    page.wait_for_selector("#command:not([hidden])")
    page.focus("#pictures button >> nth=0")
    page.keyboard.press("Enter")
    page.wait_for_selector("#large[open]")
    page.keyboard.press("Escape")
    assert page.locator("#large[open]").count() == 0
