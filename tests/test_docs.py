"""README and docs: their commands and Python snippets run as they stand, their links and line numbers are right.

A block that is not run has `<!-- not run: why -->` on the line before it, a long one `<!-- slow -->`. Commands run in a
directory with small stand-ins for what they name: `runs/digits`, a folder of pictures, and checkpoints as they lie in
the hub's cache. Training and encoding take flags besides that make models small and trainings short; not those of a
block with `<!-- slow, in full -->`.
"""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from tests import checkpoints, pictures
from tests.helpers import ENVIRONMENT, ROOT, Forks, tiny_config, tiny_flags

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What runs at full size does so as for users: without the tests' flags, which make compilation fast and code slow.
AT_FULL_SPEED = {key: value for key, value in ENVIRONMENT.items() if key != "XLA_FLAGS"}
WITH_TORCH = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>bash|python)\n(?P<text>.*?)^```", re.M | re.S)
IN_FULL = "slow, in full"
SERVER, SERVED = "slow, a server", "slow, with that server"
NOT_RUN = {
    "the tests themselves",
    "needs the data set",
    "needs the Inception weights",
    "needs lmms-eval",
    "needs the TPU's compiler",
    "needs a TPU pod",
    "needs a cluster",
    "needs GPUs",
}


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    line: int
    mark: str
    language: str
    text: str


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield Block(page.name, line, match["mark"] or "", match["language"], match["text"])


def runnable(language: str) -> list:
    """Those of a language that are run, with the name and the marks of their tests."""
    marks = {"": (), "slow": pytest.mark.slow, IN_FULL: pytest.mark.slow}
    own = [block for block in blocks() if block.language == language and block.mark in marks]
    return [pytest.param(block, id=f"{block.page}:{block.line}", marks=marks[block.mark]) for block in own]


def test_a_block_that_is_not_run_says_why():
    for block in blocks():
        reason = block.mark.removeprefix("not run: ")
        assert block.mark in ("", "slow", IN_FULL, SERVER, SERVED) or reason in NOT_RUN, (
            f"{block.page}:{block.line}: {block.mark}"
        )


# ---- Where they run

# What the tiny config and the test's pictures have in common, but for the places that the experiment itself names.
PLACES = ("images__source", "images__name", "data__source", "data__latents", "data__autoencoder")
OF_PICTURES = pictures.settings(Path("pictures"), Path("weights"))
OF_PICTURES = {key: value for key, value in OF_PICTURES.items() if key not in PLACES}
OF_PICTURES |= dict(train__steps=2, eval__every=0, dtype="float32", mesh__expert=1, mesh__fsdp=1)
# The small checkpoints' geometry.
OF_PICTURES |= dict(model__text__vocab_size=checkpoints.VOCABULARY, model__text__rope_theta=1e4)
OF_PICTURES |= dict(model__vision__num_heads=2, model__vision__patch_size=2, data__latent_shape=(4, 4, 8))
OF_DIGITS = dict(pretrain__steps=1, train__steps=2, eval__every=0)
OF_SWEEPS = dict(pretrain__steps=1, train__steps=2, eval__every=1, eval__batch_size=20)


def small(command: str, arguments: list[str]) -> list[str]:
    """The arguments, after flags that make an experiment small; what the command itself sets stays."""
    experiment = next((each for each in arguments if each.startswith("--config=")), "")
    if command not in ("train", "encode", "sweep") or "--print_config" in arguments:
        return arguments
    if command == "sweep":  # whose variants choose the groups, and some the layers
        flags = [flag for flag in tiny_flags(**OF_SWEEPS)[1:] if "num_layers" not in flag and "num_groups" not in flag]
        flags = [flag.replace("--config.", "--config.base.") for flag in flags]
        flags += ["--config.seeds=0,", "--config.sample_steps=2,"]
    elif experiment == "--config=configs/digits.py":
        flags = tiny_flags(**OF_DIGITS)[1:]
    else:
        flags = [flag for flag in tiny_flags(**OF_PICTURES)[1:] if "evaluators" not in flag]
    names = {each.partition("=")[0] for each in arguments}
    flags = [flag for flag in flags if flag.partition("=")[0] not in names]
    return [experiment, *flags, *(each for each in arguments if each != experiment)]


def in_hub_cache(cache: Path, name: str) -> Path:
    """Where huggingface_hub keeps a repository that it has downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    return repository / "snapshots" / "0123abc"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("docs")
    for name in ("configs", "docs", "launch"):
        (place / name).symlink_to(ROOT / name)
    stages.train(
        tiny_config(pretrain__steps=1, train__steps=2, eval__every=0), place / "runs" / "digits", InterruptGuard()
    )
    pictures.folder(place / "pictures", 12)
    pictures.pieces(1)[0][2].save(place / "photo.jpg")
    cache, tiny_vlm = place / "hub", checkpoints.tiny_config(**checkpoints.OF_DIGITS)
    checkpoints.save(checkpoints.random_model(tiny_vlm), in_hub_cache(cache, "Qwen/Qwen2-VL-2B-Instruct"))
    for family in ("sana-1.0", "in-1.0"):
        autoencoder = checkpoints.random_autoencoder(family)
        if family == "sana-1.0":  # which states its scale
            autoencoder.register_to_config(scaling_factor=0.41407)
        autoencoder.save_pretrained(in_hub_cache(cache, f"mit-han-lab/dc-ae-f32c32-{family}-diffusers"))
    checkpoints.AutoencoderTiny(latent_channels=16).save_pretrained(in_hub_cache(cache, "madebyollin/taesd3"))
    return place


@pytest.fixture(scope="module")
def forks(place) -> Iterator[Forks]:
    forks = Forks(place, {"HF_HUB_CACHE": str(place / "hub"), "HF_HUB_OFFLINE": "1"})
    yield forks
    forks.close()


# ---- What runs


def run_line(line: str, place: Path, forks: Forks, in_full: bool = False) -> None:
    """Runs one line of a block as a shell would."""
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    assert words[0] == "python", f"no rule to run {line}"
    if in_full:
        environment = AT_FULL_SPEED | {"HF_HUB_CACHE": str(place / "hub")} | variables
        subprocess.run([sys.executable, *words[1:]], cwd=place, env=environment, check=True)
        return
    if words[1] == "-m" and words[2].startswith("lattejax."):
        command = words[2].removeprefix("lattejax.")
        if command == "convert":  # as on another page before
            shutil.rmtree(place / words[-1].removeprefix("--out="), ignore_errors=True)
        done = forks(command, *small(command, words[3:]), env=variables)
    else:
        if "lattejax.train" in words:
            start = words.index("lattejax.train") + 1
            words[start:] = small("train", words[start:])
        command = [sys.executable, *words[1:]]
        done = subprocess.run(command, cwd=place, env=ENVIRONMENT | variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("block", runnable("bash"))
def test_commands_run(block, place, forks):
    """In their order, since later ones use what earlier ones make."""
    for line in block.text.splitlines():
        if line.startswith("pip install -e . && "):  # the main job, at full size
            if not (place / "fresh").exists():
                (place / "fresh").mkdir()
                (place / "fresh" / "configs").symlink_to(ROOT / "configs")
            command = [sys.executable, *shlex.split(line.partition("&& ")[2])[1:]]
            subprocess.run(command, cwd=place / "fresh", env=AT_FULL_SPEED, check=True)
        elif line.startswith("for "):  # a loop of the shell, at full size, against PyTorch
            subprocess.run(["bash", "-euo", "pipefail", "-c", line], cwd=place, env=WITH_TORCH, check=True)
        else:
            run_line(line, place, forks, block.mark == IN_FULL)


@pytest.mark.parametrize("block", runnable("python"))
def test_snippets_run(block, place, monkeypatch):
    monkeypatch.chdir(place)
    exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {"__name__": "snippet"})


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in blocks() if block.mark == SERVER}))
def test_a_server_and_what_uses_it_run(page, place, monkeypatch, tmp_path):
    """The page's server, and meanwhile its other blocks; a minute of load is a second here."""
    own = [block for block in blocks() if block.page == page]
    (server,) = [block for block in own if block.mark == SERVER]
    _, *flags = shlex.split(server.text.partition("&& python -m ")[2])
    monkeypatch.chdir(place)
    forks = Forks(place)
    started = forks.start("serve", *flags, "--batch_size=16", output=tmp_path / "log")
    try:
        while "serving " not in (tmp_path / "log").read_text():
            assert started.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        for block in (block for block in own if block.mark == SERVED):
            if block.language == "python":
                exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {"__name__": "snippet"})
            for line in block.text.splitlines() if block.language == "bash" else ():
                run_line(f"{line} --seconds=2 --repeats=1", place, forks)
        started.send_signal(signal.SIGTERM)
        assert started.wait() == 0
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGKILL)
        forks.close()


# ---- What they say


def test_the_readme_is_one_page():
    assert (ROOT / "README.md").stat().st_size <= 10 * 1024


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_the_code_are_where_they_are_said_to_be(page):
    """As in: `def velocity` in models/generation.py:113."""
    quoted = re.findall(r"`([^`]+)` in [\[`]([\w/]+\.py):(\d+)[\]`]", page.read_text())
    assert len(quoted) >= {"README.md": 15, "method.md": 15}.get(page.name, 0), "they are written in another way"
    for name, path, number in quoted:
        lines = (ROOT / "lattejax" / path).read_text().splitlines()
        found = [i + 1 for i, line in enumerate(lines) if name in line]
        assert int(number) in found, f"{page.name}: `{name}` is at {path}:{found}, not at {number}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            path, _, part = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name}: there is no {path}"
            if part and there.suffix == ".md":
                headings = re.findall(r"^#+ (.+)$", there.read_text(), re.M)
                assert part in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], (
                    target
                )


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path / 'site'}"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert (tmp_path / "site" / "ablations" / "index.html").exists()
