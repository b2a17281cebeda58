"""The commands as users run them: results, and bad input as one line and exit code 2."""

import dataclasses
import json
import os
import pathlib
import pty
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from lattejax import cli, configuration
from lattejax.__main__ import COMMANDS
from lattejax.data import tokenizer as tokenizers
from lattejax.data.images import open_image
from lattejax.data.prompts import Turn
from lattejax.flow.schedule import Sampling
from lattejax.runs.run import Run
from lattejax.runs.workdir import Workdir
from lattejax.sampling.answers import Answerer, Decoding
from lattejax.sampling.images import ImageSampler
from lattejax.training import stages
from lattejax.training.interrupt import InterruptGuard
from tests import checkpoints
from tests.helpers import ENVIRONMENT, NO_DIGITS, NO_SCORES, ROOT, encoder_for, run_command, tiny_config, tiny_flags
from tests.models import inception_rendering


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    # A learning rate so high that after two steps the pathway's velocities are far from their initial zero.
    settings = dict(pretrain__steps=1, train__steps=2, train__learning_rate=0.05, train__ema_decay=0.0)
    settings |= dict(eval__sample_steps=5, eval__guidance=1.5, eval__shift=2.0)
    config = tiny_config(**settings | NO_DIGITS)
    stages.train(config, path, InterruptGuard())
    return path


@pytest.fixture(scope="module")
def digit(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "digit.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30)).astype(np.uint8)).save(path)
    return path


def test_sample_draws_every_prompt_in_order(workdir, tmp_path):
    out = tmp_path / "new" / "grid.png"
    prompts = ["--prompt=a handwritten seven", "--prompt=a handwritten two"]
    relative = os.path.relpath(workdir, ROOT)
    done = run_command("sample", f"--workdir={relative}", *prompts, "--num=3", f"--out={out}", "--npz")
    assert done.returncode == 0 and "no rule of" not in done.stderr, done.stderr
    images = np.load(out.with_suffix(".npz"))["arr_0"]
    assert images.shape == (6, 8, 8, 3) and images.dtype == np.uint8
    assert "guidance scale 1.5, steps per group: [2, 3]" in done.stdout, "as its scores are, by the run's config"
    grid = np.asarray(Image.open(out))
    zoom = 8
    first, fourth = (images[i].repeat(zoom, 0).repeat(zoom, 1) for i in (0, 3))
    assert np.array_equal(grid[22:86, 4:68], first), "the first prompt's first image, under its label"
    assert np.array_equal(grid[108:172, 4:68], fourth), "the second prompt's"


def test_sample_uses_every_setting_and_a_conditioning_image(workdir, digit, tmp_path, forked_command):
    """All flags together give the library's images with the same settings; changing any setting changes the images."""
    out = tmp_path / "drawn.npz"
    flags = ["--guidance=3", "--solver=heun", "--shift=0.5", "--guidance_interval=0.2,0.6", f"--image={digit}"]
    flags += ["--negative_prompt=a handwritten seven"]
    common = [f"--workdir={workdir}", "--prompt=a handwritten two", "--num=1", "--steps=4", "--seed=2", "--npz"]
    done = forked_command("sample", *common, *flags, f"--out={out.with_suffix('.png')}")
    assert done.returncode == 0, done.stderr
    assert "steps per group: [3, 1]" in done.stdout, "by the shift"

    sampler = ImageSampler.load(workdir)
    images = [sampler.encoder.read_image(open_image(str(digit)))]
    shown = sampler.encoder.drawing("a handwritten two", images)
    sampling = Sampling(4, 3.0, (0.2, 0.6), "heun", 0.5)
    plain = dict(images_per_prompt=1, batch_size=1)
    one = plain | dict(negative=[sampler.encoder.drawing("a handwritten seven", images)])
    drawn = np.load(out)["arr_0"].astype(int)
    assert np.abs(sampler([shown], sampling, seed=2, **one) - drawn).max() <= 1
    others = [
        sampler([shown], sampling, seed=1, **one),
        sampler([sampler.encoder.drawing("a two")], sampling, seed=2, **one),
        sampler([shown], sampling, seed=2, **plain),
    ]
    for change in (dict(guidance=1.5), dict(solver="euler"), dict(guidance_interval=(0.0, 1.0))):
        others.append(sampler([shown], dataclasses.replace(sampling, **change), seed=2, **one))
    assert all(np.abs(other - drawn).max() > 1 for other in others)


def test_chat_answers_for_a_run(workdir, digit, forked_command):
    done = forked_command(
        "chat", f"--workdir={workdir}", f"--image={digit}", "--question=Which digit is this?", "--max_tokens=3"
    )
    assert done.returncode == 0, done.stderr
    answerer = Answerer.of(Run.open(workdir))
    prompt = answerer.encoder.question("Which digit is this?", [answerer.encoder.read_image(open_image(str(digit)))])
    assert done.stdout == "".join(answerer.stream(prompt, Decoding(max_tokens=3))) + "\n"


def test_an_exported_run_has_its_licence(workdir, tmp_path, forked_command):
    flags = [f"--source={workdir}", "--to=safetensors", "--license=mit", f"--out={tmp_path / 'export'}"]
    done = forked_command("convert", *flags)
    assert done.returncode == 0 and "is complete" in done.stdout, done.stderr
    assert "\nlicense: mit\n" in (tmp_path / "export" / "README.md").read_text()


# ---- Chats with converted weights


@pytest.fixture(scope="module")
def weights():
    return checkpoints.convert(checkpoints.random_model(checkpoints.tiny_config()))


def expected_answer(weights, turns, **decoding):
    """The library's answer, computed in this process; turns are (role, text, image files)."""
    answerer = Answerer.load(weights, "float32")
    encoder = answerer.encoder
    turns = [
        Turn(role, (*(encoder.read_image(open_image(str(image))) for image in images), text))
        for role, text, images in turns
    ]
    return "".join(answerer.stream(encoder.chat(turns), Decoding(**decoding)))


def test_chat_reads_its_question_from_a_pipe_and_uses_every_setting(weights, digit, forked_command):
    flags = [f"--image={digit}", f"--image={digit}", "--system=Speak.", "--temperature=0.7", "--top_p=0.9", "--seed=3"]
    done = forked_command(
        "chat", f"--weights={weights}", "--dtype=float32", "--max_tokens=5", *flags, input="Which digits are these?\n"
    )
    assert done.returncode == 0, done.stderr
    turns = [("system", "Speak.", []), ("user", "Which digits are these?", [digit, digit])]
    expected = expected_answer(weights, turns, max_tokens=5, temperature=0.7, top_p=0.9, seed=3)
    assert done.stdout == expected + "\n"


def test_a_chat_on_a_terminal_is_conditioned_on_earlier_turns(weights, digit):
    ours, theirs = pty.openpty()
    last_seed = ["--seed=4294967295"]  # each answer has its own, and these go round
    typed = f"Is this a three?\n/image nothing.png\n/image {digit}\nAnd this?\n/new\nIs this a three?\n\x04"
    os.write(ours, b"caf\xc3\n/image caf\xe9.png\n" + typed.encode())
    chat = [f"--weights={weights}", "--dtype=float32", "--max_tokens=6", *last_seed]
    done = run_command("chat", *chat, stdin=theirs, env=ENVIRONMENT | {"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0, done.stderr
    first = expected_answer(weights, [("user", "Is this a three?", [])], max_tokens=6)
    turns = [("user", "Is this a three?", []), ("assistant", first, []), ("user", "And this?", [digit])]
    second = expected_answer(weights, turns, max_tokens=6)
    output = done.stdout.replace("> ", "")
    assert output.startswith("Type a question.")
    refused = f"error: there is no {pathlib.Path.cwd() / 'nothing.png'}\n"
    undecoded = "error: the text 'caf\\\\udcc3' is no Unicode: surrogates not allowed\n"
    missing = f"error: there is no {pathlib.Path.cwd()}/caf\\udce9.png\n"
    assert output.split("\n", 1)[1] == f"{undecoded}{missing}{first}\n{refused}{second}\n{first}\n\n"


# ---- Errors

SLOW_TO_IMPORT = ("transformers", "tensorflow_datasets", "grain", "sklearn", "matplotlib", "tensorboardX")
AS_A_USER = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(f"lattejax.{sys.argv[0]}", run_name="__main__", alter_sys=True)
except SystemExit as ended:
    print(ended.code, *(name for name in NAMES if name in sys.modules))
"""


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["train", "--config=digits", "--workdir=a", "--config.train.steps=-1"], 2),
        (["sample", "--workdir=nowhere", "--prompt=a"], 2),
        (["encode", "--help"], 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_help_and_errors_do_not_wait_for_slow_imports(arguments, code):
    program = AS_A_USER.replace("NAMES", repr(SLOW_TO_IMPORT))
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True)
    assert done.stdout.splitlines()[-1] == str(code), done.stdout + done.stderr


def test_help_lists_the_flags_and_the_package_lists_its_commands(forked_command):
    done = forked_command("sample", "--help")
    assert done.returncode == 0 and "--guidance_interval" in done.stdout and not done.stderr
    listed = subprocess.run([sys.executable, "-m", "lattejax"], cwd=ROOT, text=True, capture_output=True)
    assert listed.returncode == 0 and all(f"lattejax.{name} " in listed.stdout for name in COMMANDS)
    files = {path.stem for path in (ROOT / "lattejax").glob("*.py") if "__main__" in path.read_text()}
    assert files == {*COMMANDS, "__main__"}


def test_evaluate_takes_scores_of_a_run_and_writes_figures_and_pictures(workdir, tmp_path):
    out = tmp_path / "new" / "scores.json"
    done = run_command("evaluate", f"--workdir={workdir}", "--scores=held_out_loss,samples", f"--out={out}")
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    figures, settings = record["figures"], record["settings"]
    assert len(settings["weights"]) == 16 and (settings["trained_steps"], settings["dtype"]) == (2, "float32")
    assert settings["data"] == "scikit-learn's digits" and settings["sampling"]["guidance"] == 1.5
    assert set(settings["scores"]) == {"held_out_loss", "samples"} and "cpu" in record["device"]
    assert figures == json.loads(done.stdout) and set(figures) == {"held_out_loss", "held_out_loss_per_group"}
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    recorded = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert figures["held_out_loss"] == pytest.approx(recorded[-1], rel=1e-6)
    drawn, kept = (Image.open(path) for path in (out.with_name("scores_samples.png"), *workdir.glob("samples/*.png")))
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(kept)).max() <= 1


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    return inception_rendering.save(
        inception_rendering.random_weights(), tmp_path_factory.mktemp("inception") / "a.pth"
    )


def test_evaluate_makes_a_reference_and_judges_drawings_and_sample_files(workdir, inception, tmp_path, forked_command):
    """The figures of what a run draws in two numbers of steps, and of the file that these drawings are kept in."""
    pictures = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=pictures)
    common = [f"--inception={inception}", "--part=10"]
    making = [f"--make_reference={tmp_path / 'real.npz'}", "--reference_pictures=5", f"--out={tmp_path / 'ref.npz'}"]
    done = forked_command("evaluate", *making, *common)
    assert done.returncode == 0 and done.stdout.startswith("10 pictures, none: the file's pictures"), done.stderr
    judge = [f"--reference={tmp_path / 'ref.npz'}", *common]
    (tmp_path / "prompts.txt").write_text("a handwritten two\na handwritten seven\n")
    draw = [f"--workdir={workdir}", "--num=10", "--steps=1,2", "--keep_pictures", f"--out={tmp_path / 'drawn.json'}"]
    draw += ["--seed=5", f"--prompts={tmp_path / 'prompts.txt'}"]
    made = forked_command("evaluate", *judge, *draw)
    kept = tmp_path / "drawn_guidance_1.5_steps_2.npz"
    read = forked_command("evaluate", *judge, f"--npz={kept}", f"--out={tmp_path / 'kept.json'}")
    assert made.returncode == read.returncode == 0, (made.stderr, read.stderr)
    assert "10 of 10 pictures, complete" in made.stderr and made.stdout.startswith("| guidance")
    rows = (tmp_path / "drawn.md").read_text().splitlines()[2:4]
    assert [row[:11] for row in rows] == ["| 1.5 | 1 |", "| 1.5 | 2 |"]
    drawn = json.loads((tmp_path / "drawn.json").read_text())["results"][-1]
    assert drawn["settings"]["num_steps"] == 2 and drawn["figures"] == pytest.approx(json.loads(read.stdout)["figures"])
    assert drawn["only_a_monitor_because"][0] == "10 pictures, not 50,000"

    sampler = ImageSampler.load(workdir)
    requests = [sampler.encoder.drawing(f"a handwritten {word}") for word in ("two", "seven")]
    sampling, once = Sampling(2, 1.5, shift=2.0), dict(images_per_prompt=1, batch_size=2)
    pictures = np.load(kept)["arr_0"].astype(int)
    expected, other = (sampler(requests, sampling, seed=seed, **once) for seed in (5, 0))
    assert np.abs(pictures[:2] - expected).max() <= 1 < np.abs(pictures[:2] - other).max()


def test_packaged_experiments_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = cli.find_config("--config=ablations:compute")
    assert found.endswith("experiments/ablations.py:compute") and pathlib.Path(found[9:].split(":")[0]).is_file()
    same = ("--config=mine", "--config=configs/digits.py", "--config.train.steps=5", "--workdir=digits")
    assert [cli.find_config(argument) for argument in same] == list(same)
    (tmp_path / "digits").write_text("mine")
    assert cli.find_config("--config=digits") == "--config=digits"
    assert cli.join_config(["--config", "digits", "--workdir", "a"]) == ["--config=digits", "--workdir", "a"]
    assert cli.join_config(["--config=digits", "--config"]) == ["--config=digits", "--config"]


def test_an_old_name_of_a_key_is_taken_with_a_warning(forked_command):
    old = ["--config.eval.scored_images=30", "--config.eval.final_images=0"]
    done = forked_command("train", "--config=configs/digits.py", *old, "--print_config")
    assert done.returncode == 0 and done.stderr.count("is an old name; use --config.eval.evaluators.") == 2
    assert "evaluators.digits.images = 30" in done.stdout and "final_digits.at = 'never'" in done.stdout


TRAIN = ["train", "--workdir={tmp}/new"]
SAMPLE = ["sample", "--workdir={workdir}"]
CHAT = ["chat", "--workdir={workdir}", "--question=What is this?"]

LATENTS = NO_SCORES | dict(data__source="latents", data__latents="{tmp}", pretrain__steps=0)

# The arguments, and a part of the error message.
BAD_INPUT = {
    "unknown key": ([*TRAIN, *tiny_flags(), "--config.train.stepz=5"], "train.steps"),
    "unknown section": ([*TRAIN, *tiny_flags(), "--config.trian.steps=5"], "train.steps"),
    "value of another type": ([*TRAIN, *tiny_flags(), "--config.train.steps=many"], "train.steps"),
    "K does not divide L": ([*TRAIN, *tiny_flags(model__num_groups=3)], "does not divide the 4 layers"),
    "batch that K does not divide": ([*TRAIN, *tiny_flags(train__batch_size=9)], "equal share"),
    "no such config file": ([*TRAIN, "--config=configs/nothing.py"], "configs/nothing.py"),
    "no such form of an experiment": (
        [*TRAIN, "--config=configs/ablations.py:medium"],
        "error: flag --config=configs/ablations.py:medium: ValueError: configs/ablations.py:medium is unknown",
    ),
    "a score that the config does not have": (
        ["train", "--config=configs/captions256.py", "--config.eval.evaluators.digits.at=end"],
        "config.eval.evaluators.digits.at: the experiment states no such key",
    ),
    "a setting that a score does not state": (
        ["train", "--config=configs/captions256.py", "--config.eval.evaluators.held_out_loss.every=10"],
        "config.eval.evaluators.held_out_loss.every: the experiment states no such key",
    ),
    "an error of the experiment's program, not of an override": (
        ["train", "--config={tmp}/experiment.py", "--config.train.steps=5"],
        "--config: AttributeError: ",
    ),
    "no workdir": (["train", *tiny_flags()], "--workdir"),
    "unknown flag": ([*SAMPLE, "--prompt=a", "--stepz=5"], "stepz"),
    "stray argument": ([*SAMPLE, "--prompt=a", "five"], "five"),
    "empty prompt": ([*SAMPLE, "--prompt= "], "prompt is empty"),
    "no prompt": (SAMPLE, "--prompt"),
    "no run": (["sample", "--workdir={tmp}/nowhere", "--prompt=a"], "no config.json"),
    "no steps": ([*SAMPLE, "--prompt=a", "--steps=0"], "steps"),
    "guidance interval that falls": ([*SAMPLE, "--prompt=a", "--guidance_interval=0.9,0.1"], "guidance_interval"),
    "guidance interval of words": ([*SAMPLE, "--prompt=a", "--guidance_interval=low,high"], "guidance_interval"),
    "unknown solver": ([*SAMPLE, "--prompt=a", "--solver=rk4"], "solver"),
    "missing conditioning image": ([*SAMPLE, "--prompt=a", "--image=nothing.png"], "nothing.png"),
    "output that is no PNG": ([*SAMPLE, "--prompt=a", "--out=grid.jpeg"], ".png"),
    "missing image": ([*CHAT, "--image=nothing.png"], "nothing.png"),
    "image that is none": ([*CHAT, "--image={tmp}/text.png"], "text.png"),
    "truncated image": ([*CHAT, "--image={tmp}/cut.png"], "cut.png"),
    "empty question": (["chat", "--workdir={workdir}", "--question="], "question is empty"),
    "no question on a pipe": (["chat", "--workdir={workdir}"], "question is empty"),
    "no weights": (["chat", "--question=a"], "--weights or --workdir"),
    "weights that are none": (["chat", "--question=a", "--weights={workdir}"], "no converted weights"),
    "mesh that does not fit": (["chat", "--question=a", "--weights={workdir}", "--mesh=tensor=3"], "--mesh=tensor=3"),
    "mesh that is none": (["chat", "--question=a", "--weights={workdir}", "--mesh=tensor"], "--mesh=tensor"),
    "seed out of range": ([*CHAT, "--seed=9223372036854775808"], "seed"),
    "image too large to be true": ([*CHAT, "--image={tmp}/bomb.bmp"], "bomb.bmp"),
    "negative temperature": ([*CHAT, "--temperature=-1"], "--temperature=-1"),
    "benchmark of nothing": (["benchmark", "--config=configs/digits.py"], "name one of sample, train, "),
    "benchmark of the unknown": (["benchmark", "speed", "--config=configs/digits.py"], "found speed"),
    "benchmark without a config": (["benchmark", "sample"], "--config"),
    "plot of nothing": (["benchmark", "plot", "--results={tmp}/none.jsonl", "--out={tmp}/a.png"], "none.jsonl"),
    "baseline of the loader": (
        ["benchmark", "data", "--config=configs/digits.py", "--against=torch"],
        "the baselines of data are: none",
    ),
    "baseline in another dtype": (
        ["benchmark", "sample", "--config=configs/imagenet256.py", "--against=torch"],
        "add --config.dtype=float32",
    ),
    "baseline of larger patches": (
        ["benchmark", "train", "--config=configs/digits.py", "--against=torch"],
        "add --config.model.patch_size=1",
    ),
    "training benchmark of Blend": (
        ["benchmark", "train", "--config=configs/digits.py", "--config.model.variant=blend"],
        "model.variant='couple'",
    ),
    "worker of too few": (["encode", *tiny_flags(), "--out={tmp}/out", "--worker=2", "--workers=2"], "--worker=2"),
    "latents without a manifest": (
        [*TRAIN, *tiny_flags(**LATENTS)],
        "no manifest.json",
    ),
    "autoencoder that is none": (
        ["encode", "--out={tmp}/out", *tiny_flags(data__autoencoder="{tmp}", **LATENTS)],
        "no autoencoder.json",
    ),
    "no Inception weights": (
        ["evaluate", "--make_reference=data", "--workdir={workdir}", "--out={tmp}/a.npz", "--inception={tmp}/none.pth"],
        "download https://github.com/mseitzer/pytorch-fid/releases",
    ),
    "pictures to judge without a reference": (["evaluate", "--npz={tmp}/a.npz"], "--npz needs --out"),
    "scores and a reference": (
        ["evaluate", "--workdir={workdir}", "--reference={tmp}/a.npz", "--out={tmp}/a.json", "--scores=samples"],
        "--reference and --scores exclude each other",
    ),
    "pictures of a run and of a file": (
        ["evaluate", "--workdir={workdir}", "--npz=b", "--reference={tmp}/a.npz", "--out={tmp}/a.json"],
        "--workdir is used only with --make_reference or --reference or --scores, not with --npz",
    ),
    "a guidance scale of pictures in a file": (
        ["evaluate", "--npz=b", "--reference={tmp}/a.npz", "--out={tmp}/a.json", "--guidance=1"],
        "--guidance is used only with --reference, not with --npz",
    ),
    "a reference and nothing to judge": (
        ["evaluate", "--reference={tmp}/a.npz", "--out={tmp}/a.json"],
        "--reference needs --workdir, or --npz",
    ),
    "a guidance scale twice": (
        ["evaluate", "--workdir={workdir}", "--reference={tmp}/a.npz", "--out={tmp}/a.json", "--guidance=1,1.0"],
        "--guidance=1,1.0 has a number twice",
    ),
    "a guidance scale outside its range": (
        ["evaluate", "--workdir={workdir}", "--reference={tmp}/a.npz", "--out={tmp}/a.json", "--guidance=1,-1"],
        "--guidance=1,-1 must be numbers",
    ),
    "a config with a very long name": (
        ["train", f"--config={'a' * 300}", "--workdir={tmp}/run"],
        "there is no such file",
    ),
    "a reference that is no .npz": (
        ["evaluate", "--make_reference={tmp}", "--image_size=8", "--out={tmp}/a.json"],
        "must end in .npz",
    ),
    "scale without an autoencoder": (
        ["convert", "--source={workdir}", "--scale=1", "--out={tmp}/o"],
        "--scale",
    ),
    "licence of what is no run": (
        ["convert", "--source={tmp}", "--license=mit", "--out={tmp}/out"],
        "--license is only for the export of a run",
    ),
    "licence that the hub does not know": (
        ["convert", "--source={workdir}", "--to=safetensors", "--license=apache", "--out={tmp}/out"],
        "the nearest are apache-2.0",
    ),
    "a picture that would not be kept": (["evaluate", "--workdir={workdir}", "--scores=samples"], "give --out"),
    "a score that is taken twice": (
        ["evaluate", "--workdir={workdir}", "--scores=held_out_loss,held_out_loss"],
        "would return figures of the same names",
    ),
    "scores against a reference, to be overwritten": (
        ["evaluate", "--workdir={workdir}", "--scores=held_out_loss", "--out={tmp}/published.json"],
        "has scores against a reference",
    ),
    "output that exists, before a download": (["convert", "--source=some/vlm", "--out={tmp}"], "exists already"),
    "a baseline without this guidance": (
        ["benchmark", "sample", "--config=configs/digits.py", "--against=janus", "--guidance=1"],
        "only with guidance above 1",
    ),
    "prompts of a benchmark that are too long": (
        ["benchmark", "data", "--config=configs/digits.py", "--config.train.share_contexts=False"],
        "add --config.data.prompt_length=",
    ),
    "scores that are missing": (
        ["convert", "--source={workdir}", "--to=safetensors", "--scores={tmp}/none.json", "--out={tmp}/out"],
        "there is no {tmp}/none.json",
    ),
    "a repository that is not in the hub's cache": (
        ["sample", "--workdir=hf://somebody/model", "--prompt=a"],
        "hf://somebody/model",
    ),
    "source that is no checkpoint": (["convert", "--source={tmp}", "--out={tmp}/out"], "no config.json"),
    "source that is no conversion": (["convert", "--to=hf", "--source={tmp}", "--out={tmp}/out"], "lattejax.convert"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, tmp_path, workdir, digit, forked_command):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "published.json").write_text('{"results": []}')
    program = "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict().train\n"
    (tmp_path / "experiment.py").write_text(program)
    (tmp_path / "cut.png").write_bytes(digit.read_bytes()[:200])
    Image.new("RGB", (1, 1)).save(tmp_path / "bomb.bmp")
    with open(tmp_path / "bomb.bmp", "r+b") as file:
        file.seek(18)
        file.write((60000).to_bytes(4, "little") * 2)
    arguments, named = BAD_INPUT[case]
    done = forked_command(*(argument.format(tmp=tmp_path, workdir=workdir) for argument in arguments))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert named.format(tmp=tmp_path) in lines[0]


def test_a_workdir_without_a_checkpoint_is_refused(tmp_path, forked_command):
    """A run killed before its first checkpoint has a config, but no weights."""
    config, workdir = tiny_config(), Workdir.at(tmp_path)
    tokenizers.save(encoder_for(config).tokenizer, workdir.tokenizer)
    configuration.save(config, workdir.config)
    for command, flag, missing in [
        ("sample", "--prompt=a", "no checkpoint"),
        ("chat", "--question=a", "no finished VLM"),
    ]:
        done = forked_command(command, f"--workdir={tmp_path}", flag)
        assert done.returncode == 2 and missing in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("what, records", [("data", 1000), ("questions", 100)])
def test_the_data_benchmarks_print_a_json_object_last(what, records, forked_command):
    flags = tiny_flags(
        train__share_contexts=False, train__batch_size=200, data__prompt_length=100, train__answer_batch_size=16
    )
    done = forked_command("benchmark", what, *flags, f"--records={records}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rate = found[{"data": "latents_per_second", "questions": "questions_per_second"}[what]]
    assert found["benchmark"] == what and found["share_of_limit"] > 0
    assert rate == pytest.approx(found["batch_size"] / found["seconds"])


def test_the_sample_benchmark_prints_a_json_object_last(forked_command):
    flags = ["--steps=2", "--batch_size=2", "--repeats=1", "--against=vanilla", "--json"]
    done = forked_command("benchmark", "sample", *tiny_flags(), *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["benchmark"], found["against"], found["num_groups"]) == ("sample", "vanilla", 2)
    assert found["ratio"] == pytest.approx(found["against_seconds"] / found["seconds"])


def test_benchmarks_of_steps_are_plotted_by_group_count(tmp_path, forked_command):
    figures = {"seconds": 0.5, "against_seconds": 0.8, "limit": 0.4, "batch_size": 1}
    results = [{"benchmark": "sample", "against": "torch", "num_groups": count} | figures for count in (4, 1, 2)]
    (tmp_path / "speed.jsonl").write_text("\n".join(map(json.dumps, results)))
    done = forked_command(
        "benchmark", "plot", f"--results={tmp_path / 'speed.jsonl'}", f"--out={tmp_path / 'speed.png'}"
    )
    assert done.returncode == 0, done.stderr
    assert open_image(tmp_path / "speed.png").width > 400


def test_the_compilation_cache_is_set_unless_jax_has_one(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    try:
        for configured, expected in ((None, "/somewhere/lattejax"), ("/elsewhere", "/elsewhere")):
            jax.config.update("jax_compilation_cache_dir", configured)
            cli.enable_compilation_cache()
            assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
