"""Measures speed, next to the machine's roofline and to baselines:

python -m lattejax.benchmark sample --config=configs/imagenet256.py --config.dtype=float32 --against=vanilla

sample: a batch of images, from prompt tokens to latents, including the context pass. --against=vanilla: the same
    weights as one group. --against=janus: Janus-Pro's language model with its KV cache (21 GiB; on two cores many
    minutes per image). --against=torch: steps of one group on given contexts, in eager PyTorch.
train: forward, backward and AdamW of one group on given contexts.
context: prompts read by the language model. decode: greedy answers. --against=torch: both with transformers.
data: latents per second from the data loader alone; random latents in the real format. questions: the same of
    questions about pictures of data.max_pixels.
serve: a server at --url: latencies of --rate requests a second, half images, half chats; then the images a second of
    --clients that each wait for theirs. --against=sample: these beside batches drawn here, of the server's run.
plot: time per image by group count; --results holds lines of JSON from sample --against=torch.

Weights are random, with the config's geometry. Figures are medians over alternating repeats, in seconds and FLOP/s.
`limit` is the roofline: the seconds that matrix products (decode: reading the weights; data: reading the bytes) would
take at the best rate that this machine reached between the repeats.
"""

import dataclasses
import json
from typing import Annotated

import jax
from absl import flags
from ml_collections import config_flags

from lattejax import cli
from lattejax.benchmarks import drawing, loading, reading, serving, speed, training
from lattejax.benchmarks.measuring import Work
from lattejax.configuration import Config
from lattejax.data import tokenizer as tokenizers
from lattejax.data.prompts import prompt_encoder
from lattejax.errors import UserError, parsing
from lattejax.files import output_file, parse_json, read_text, resolve_path, write_with
from lattejax.flow.schedule import Guidance, NumSteps
from lattejax.models.text import MOST_POSITIONS
from lattejax.ranges import Range, Seed, Size
from lattejax.runs.geometry import resolve_config

MODELS = {
    "sample": drawing.sample,
    "train": training.train,
    "context": reading.context,
    "decode": reading.decode,
}
RATES = {"data": loading.data_rate, "questions": loading.question_rate}
BASELINES = {"sample": ("vanilla", "torch", "janus"), "train": ("torch",), "context": ("torch",), "decode": ("torch",)}
BASELINES["serve"] = ("sample",)
Tokens = Annotated[int, Range(2, MOST_POSITIONS)]
BATCH_SIZES = {"sample": 1, "train": 16, "context": 1, "decode": 1, "serve": 16}

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config().")
AGAINST = flags.DEFINE_enum(
    "against", "", ["", *BASELINES["sample"], "sample"], "The baseline, timed in alternation with ours."
)
BATCH_SIZE = cli.define_number(
    "batch_size", None, "Images, prompts or answers; default: 16 for train and serve, else 1.", Size
)
PROMPT_TOKENS = cli.define_number("prompt_tokens", 16, "Tokens in each prompt.", Tokens)
STEPS = cli.define_number("steps", 40, "For sample and serve: steps per call.", NumSteps)
GUIDANCE = cli.define_number(
    "guidance", 5.0, "For sample and serve: guidance scale; 1 omits the unconditional pass.", Guidance
)
NEW_TOKENS = cli.define_number("new_tokens", 64, "For decode and serve: tokens per answer.", Tokens)
RECORDS = cli.define_number(
    "records", 20_000, "For data and questions: records to write and read.", Annotated[int, Range(100, 10**7)]
)
REPEATS = cli.define_number("repeats", 5, "Timed rounds, after one untimed warm-up.", Annotated[int, Range(1, 10_000)])
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")
URL = flags.DEFINE_string("url", None, "For serve: the server, like http://127.0.0.1:8000.")
API_KEY = flags.DEFINE_string("api_key", "", "For serve: the server's key.")
RATE = cli.define_number("rate", 2.0, "For serve: requests a second.", Annotated[float, Range(0.001, 10_000)])
CLIENTS = cli.define_number("clients", 16, "For serve: clients that wait.", Annotated[int, Range(1, 1000)])
SECONDS = cli.define_number("seconds", 30, "For serve: how long each loop takes.", Annotated[float, Range(0.1, 86_400)])
SEED = cli.define_number("seed", 0, "For serve: seed of the arrivals.", Seed)
RESULTS = cli.define_path("results", None, "For plot: a file of JSON lines.")
OUT = cli.define_path("out", "speed.png", "For plot: the image file to write.")


def main(what: str) -> None:
    if what == "plot":
        return plot(RESULTS.value, OUT.value)
    if what == "serve":
        return show({"benchmark": what} | serve())
    if CONFIG.value is None:
        raise UserError(f"--config is missing: it defines the geometry that {what} uses")
    config = resolve_config(CONFIG.value, weights_needed=False)
    result = data(what, config) if what in RATES else model(what, config)
    show(result)


def show(result: dict) -> None:
    for name, value in result.items():
        print(f"{name:24} {value:,.4g}" if isinstance(value, float) else f"{name:24} {value}")
    if JSON.value:
        print(json.dumps(result))


def serve() -> dict:
    if URL.value is None:
        raise UserError("--url is missing: the server to load, like http://127.0.0.1:8000")
    check_baseline("serve", None)
    settings = (RATE.value, CLIENTS.value, SECONDS.value, STEPS.value, GUIDANCE.value, NEW_TOKENS.value, SEED.value)
    load = serving.Load(URL.value, API_KEY.value, *settings)
    return serving.serve(load, AGAINST.value, BATCH_SIZE.value or BATCH_SIZES["serve"], REPEATS.value)


def model(what: str, config: Config) -> dict:
    check_baseline(what, config)
    batch_size = BATCH_SIZE.value or BATCH_SIZES[what]
    work = Work(batch_size, PROMPT_TOKENS.value, STEPS.value, GUIDANCE.value, NEW_TOKENS.value, REPEATS.value)
    setting = {
        "benchmark": what,
        "against": AGAINST.value,
        "device": jax.devices()[0].device_kind,
        "dtype": config.dtype,
        "num_groups": config.model.num_groups,
    }
    return setting | MODELS[what](config, work, AGAINST.value) | dataclasses.asdict(work)


def data(what: str, config: Config) -> dict:
    check_baseline(what, config)
    encoder = prompt_encoder(config, tokenizers.train(loading.make_captions(100), 400))
    return {"benchmark": what} | RATES[what](config, encoder, RECORDS.value)


def plot(results: str, out: str) -> None:
    if results is None:
        raise UserError("--results is missing: the file to plot")
    lines = read_text(resolve_path(results)).splitlines()
    found = [parse_json(line, f"--results={results}, line {number},") for number, line in enumerate(lines, 1)]
    if not found or any((one.get("benchmark"), one.get("against")) != ("sample", "torch") for one in found):
        raise UserError(f"--results={results} must hold one JSON object per line, from sample --against=torch --json")
    path = output_file(out, ".png")
    with parsing(f"--results={results}"):
        figure = speed.plot_by_groups(found)
    write_with(path, lambda file: figure.savefig(file, format="png", dpi=120))


def check_baseline(what: str, config: Config | None) -> None:
    baselines = BASELINES.get(what, ())
    if AGAINST.value and AGAINST.value not in baselines:
        raise UserError(f"--against={AGAINST.value}: the baselines of {what} are: {', '.join(baselines) or 'none'}")
    if AGAINST.value in ("torch", "janus") and (config.dtype != "float32" or jax.default_backend() != "cpu"):
        raise UserError(f"--against={AGAINST.value} runs only on a CPU, in float32: add --config.dtype=float32")
    if AGAINST.value == "janus" and GUIDANCE.value <= 1:
        raise UserError(f"--guidance={GUIDANCE.value:g}: Janus in transformers draws only with guidance above 1")
    if AGAINST.value == "torch" and what in ("sample", "train"):
        for key, only in (("patch_size", 1), ("residual_attention", "probabilities"), ("conditioning", "time")):
            if getattr(config.model, key) != only:
                raise UserError(f"the PyTorch version is for one kind of model: add --config.model.{key}={only}")


if __name__ == "__main__":
    cli.run(main, cli.check_config_flags, commands=(*MODELS, *RATES, "serve", "plot"))
