"""The speed of reading and answering prompts; see `measuring`."""

import jax
import numpy as np

from lattejax.benchmarks.measuring import (
    Result,
    Work,
    layer_products,
    load_baseline,
    measure,
    must_agree,
    random_params,
    random_prompts,
    without_vision,
)
from lattejax.benchmarks.speed import alternate, bandwidth, reading_calls
from lattejax.configuration import Config
from lattejax.data.prompts import PromptEncoder
from lattejax.errors import UserError
from lattejax.models import flops
from lattejax.models.functional import Params
from lattejax.sampling.answers import Answerer, Decoding
from lattejax.sampling.images import read_prompts


def context(config: Config, work: Work, against: str) -> Result:
    """Reads prompts with the language model, for every layer's keys and values."""
    config = without_vision(config)
    model, vlm = config.model_config, random_params(config, "vlm")["vlm"]
    prompts = random_prompts(config, work.batch_size, work.prompt_tokens)

    def read():
        return read_prompts(model, vlm, prompts)

    calls = {"ours": read}
    if against:
        baseline = load_baseline("qwen2_vl").Reader(model.vlm, vlm, prompts)
        must_agree(read().layers[-1].values, baseline.last_values())
        calls["theirs"] = baseline.read
    products = layer_products(model.vlm.text, work.batch_size * work.prompt_tokens)
    work_flops = flops.reading(model.vlm.text, work.prompt_tokens) * work.batch_size
    return measure(config, work, calls, products, work_flops, against)[0]


class _Endless(PromptEncoder):
    """Replaces the encoder of an Answerer, so that answers do not stop."""

    stop_tokens = (-1,)

    def __init__(self):
        pass  # it encodes nothing


def decode(config: Config, work: Work, against: str) -> Result:
    """Greedy answers of `new_tokens` tokens, including reading the prompt; figures are for one token of the batch."""
    config = without_vision(config)
    model, vlm = config.model_config.vlm, random_params(config, "vlm")["vlm"]
    prompts = random_prompts(config, work.batch_size, work.prompt_tokens)
    answerer = Answerer(model, vlm, _Endless())

    def ours():
        return np.stack(list(answerer.tokens(prompts, Decoding(work.new_tokens))), axis=1)

    calls = {"ours": ours} | reading_calls()
    if against:
        baseline = load_baseline("qwen2_vl").Reader(model, vlm, prompts)
        if not np.array_equal(mine := ours(), theirs := baseline.answer(work.new_tokens)):
            raise UserError(f"our tokens and the baseline's differ: {mine.tolist()} and {theirs.tolist()}")
        calls["theirs"] = lambda: baseline.answer(work.new_tokens)
    seconds = alternate(calls, work.repeats)
    read = weight_bytes(vlm["text"])
    limit = read / bandwidth(seconds)
    own = seconds["ours"] / work.new_tokens
    result = {"seconds": own, "tokens_per_second": work.batch_size / own}
    if against:
        other = seconds["theirs"] / work.new_tokens
        result |= {"against_seconds": other, "ratio": other / own}
    return result | {
        "limit": limit,
        "share_of_limit": limit / own,
        "bandwidth": bandwidth(seconds),
        "weight_bytes": read,
    }


def weight_bytes(text: Params) -> int:
    """The bytes that decoding one token reads: all layers and the head. Of a separate embedding it reads one row."""
    ends = text["vocabulary"]
    head = ends.get("lm_head", ends["embedding"])
    return sum(leaf.nbytes for leaf in jax.tree.leaves((text["layers"], head)))
