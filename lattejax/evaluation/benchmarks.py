"""What `lattejax.benchmark` measures at a config's geometry, on random weights, beside the machine's limit and rivals.

The limit of a computation is the time that its matrix products would take at the best rate that any one of the model's
products reaches alone, or for decoding the time in which the weights can be read once; of small models it is no limit,
since a small product takes longer to start than to compute. Rivals are renderings of the same in PyTorch and stand with
the tests (`tests/rivals`), because PyTorch is no requirement of this package; their outputs are compared with ours
before anything is timed.
"""

import dataclasses
import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lattejax.configuration import Config
from lattejax.errors import UserError
from lattejax.evaluation.speed import (
    Calls,
    Product,
    alternate,
    bandwidth,
    best_rate,
    product_calls,
    reading_calls,
)
from lattejax.flow.schedule import Sampling, plan_segments
from lattejax.models import flops, latte_flow
from lattejax.models.functional import Params
from lattejax.models.generation import Context
from lattejax.models.qwen2_vl import Prompts
from lattejax.models.text import KeysValues, TextConfig
from lattejax.parallel import rules
from lattejax.parallel.mesh import one_device
from lattejax.sampling.answers import Answerer, Decoding
from lattejax.sampling.images import draw_latents, read_prompts, sample_noise
from lattejax.training.objectives import Frozen
from lattejax.training.plans import TRAINING_PASSES, flow_loss, stage_rows
from lattejax.training.step import compile_for, init_state, make_train_step, row_keys
from lattejax.weights.runs import abstract_params, abstract_trained

AGREEMENT = 1e-3  # between our float32 outputs and a rival's: the norm of the difference over that of theirs
RIVALS = {"sample": ("vanilla", "torch", "janus"), "train": ("torch",), "context": ("torch",), "decode": ("torch",)}
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """How much of it is measured."""

    batch_size: int
    prompt_tokens: int
    steps: int  # of a sampling call
    guidance: float
    new_tokens: int  # that are decoded
    repeats: int

    @property
    def rows(self) -> int:
        """Rows of a sampling step: guided, an image has two."""
        return self.batch_size * (1 if self.guidance == 1 else 2)


# ---- Drawing


def sample(config: Config, work: Work, against: str) -> Result:
    """One call for `batch_size` images, from their prompts' tokens to latents; against PyTorch steps of one group."""
    return one_groups_steps(config, work) if against == "torch" else whole_images(config, work, against)


def whole_images(config: Config, work: Work, against: str) -> Result:
    """The context pass and all steps, the autoencoder left out."""
    config = without_vision(config)
    model, params = config.model_config, random_params(config)
    pathway, vlm = latte_flow.pathway(model, params), params.pop("vlm")
    prompts = random_prompts(config, work.batch_size + 1, work.prompt_tokens)  # the empty one is as long here
    rows = jnp.arange(work.batch_size)

    def draw(model=model):
        segments = plan_segments(model.generation.intervals, Sampling(work.steps, work.guidance))
        contexts = read_prompts(model, vlm, prompts)
        noise = sample_noise(0, rows, model.generation.latent_shape)
        return draw_latents(model, pathway, contexts, rows, noise, work.guidance, segments=segments)

    calls = {"ours": draw, "context": lambda: read_prompts(model, vlm, prompts)}
    products = layer_products(model.vlm.text, work.rows * num_tokens(config))
    if against == "vanilla":
        one_group = dataclasses.replace(model.generation, num_groups=1, group_sizes=(), interval_edges=())
        calls["theirs"] = lambda: draw(dataclasses.replace(model, generation=one_group))
    if against == "janus":
        rival = load_rival("janus").Janus(work.batch_size, work.prompt_tokens, work.guidance)
        calls["theirs"] = rival.draw
    work_flops = flops.reading(model.vlm.text, work.prompt_tokens) * len(prompts.mask)
    work_flops += work.steps * work.rows * flops.velocity(model.generation, work.prompt_tokens)
    result, seconds = measure(config, work, calls, products, work_flops, against)
    return result | {
        "seconds_per_image": seconds["ours"] / work.batch_size,
        "context_seconds": seconds["context"],
        "step_seconds": (seconds["ours"] - seconds["context"]) / work.steps,
    }


def one_groups_steps(config: Config, work: Work) -> Result:
    """Steps of one group of L/K layers, contexts given; all figures are for one step."""
    config = without_vision(first_group(config))
    model, params = config.model_config, random_params(config)
    pathway = latte_flow.pathway(model, params)
    contexts = read_prompts(model, params.pop("vlm"), random_prompts(config, work.batch_size + 1, work.prompt_tokens))
    rows = jnp.arange(work.batch_size)
    noise = sample_noise(0, rows, model.generation.latent_shape)
    segments = plan_segments(model.generation.intervals, Sampling(work.steps, work.guidance))

    def draw():
        return draw_latents(model, pathway, contexts, rows, noise, work.guidance, segments=segments)

    rival = load_rival("pathway").Sampler(model.generation, pathway, contexts, noise, work.guidance, work.steps)
    must_agree(draw(), rival.draw())
    products = layer_products(model.vlm.text, work.rows * num_tokens(config))
    work_flops = work.steps * work.rows * flops.velocity(model.generation, work.prompt_tokens)
    calls = {"ours": draw, "theirs": rival.draw}
    return measure(config, work, calls, products, work_flops, "torch", work.steps)[0]


# ---- Training


def train(config: Config, work: Work, against: str) -> Result:
    """Forward, backward and AdamW of one group of L/K layers, contexts given; no average is kept."""
    if config.trains_answers:
        raise UserError("train measures the step of model.variant='couple'; Blend's trains the VLM and answers besides")
    config = without_vision(first_group(config))
    plain = dict(accumulation=1, warmup_steps=0, decay="none", prompt_dropout=0.0, share_contexts=True, stratified=True)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=work.batch_size, **plain))
    model, rows, loss = config.model_config, stage_rows(config)["train"], flow_loss(config)
    trained = random_like(abstract_trained(config))
    contexts = random_contexts(config, work)
    numbers = rows["images"].numbers
    latents = np.random.default_rng(1).standard_normal((*numbers.shape, *config.data.latent_shape), np.float32)
    batch, key = {"images": {"latents": latents, "caption": numbers}}, jax.random.key(0)
    frozen = Frozen({}, contexts=contexts)

    calls, rival = {}, None
    if against:
        u, noise, _ = loss.draw(row_keys(jax.random.fold_in(key, 0), numbers[0]))
        t = model.generation.intervals.draw(u, loss.density)[0]
        rival = load_rival("pathway").Trainer(config, trained, contexts, latents[0, 0], noise[0], t)
        calls["theirs"] = rival.step
    first_head = np.array(trained["head"]["proj"]["weight"])

    stage, mesh = dataclasses.replace(config.train, ema_decay=0.0), one_device()  # no average is kept
    init = functools.partial(init_state, stage)
    placed = rules.shardings(mesh, jax.eval_shape(init, trained))
    state = jax.jit(init, out_shardings=placed, donate_argnums=0)(trained)
    step = compile_for(mesh, make_train_step(stage, loss, rows), state, frozen, rows)

    def ours():
        nonlocal state
        state, metrics = step(state, frozen, batch, key)
        return metrics

    if rival is not None:
        mine, theirs = ours(), rival.step()
        must_agree([mine["loss"], mine["grad_norm"]], theirs)
        must_agree(np.array(state.params["head"]["proj"]["weight"]) - first_head, rival.head() - first_head)
    products = layer_products(model.vlm.text, work.batch_size * num_tokens(config))
    step_flops = TRAINING_PASSES * flops.velocity(model.generation, work.prompt_tokens) * work.batch_size
    return measure(config, work, {"ours": ours} | calls, products, step_flops, against)[0]


def random_contexts(config: Config, work: Work) -> Context:
    """Contexts of each row's prompt and the empty one, as if they had been read."""
    text, count, length = config.model.text, work.batch_size + 1, work.prompt_tokens
    shape = jax.ShapeDtypeStruct((text.num_layers, count, length, text.num_kv_heads, text.head_dim), config.dtype)
    layers = random_like(KeysValues(shape, shape), jnp.dtype(config.dtype))
    return Context(layers, jnp.ones((count, length), bool), jnp.full(count, length, jnp.int32))


# ---- Reading and answering


def context(config: Config, work: Work, against: str) -> Result:
    """Prompts read by the language model, for every layer's keys and values."""
    config = without_vision(config)
    model, vlm = config.model_config, random_params(config, "vlm")["vlm"]
    prompts = random_prompts(config, work.batch_size, work.prompt_tokens)

    def read():
        return read_prompts(model, vlm, prompts)

    calls = {"ours": read}
    if against:
        rival = load_rival("qwen2_vl").Reader(model.vlm, vlm, prompts)
        must_agree(read().layers[-1].values, rival.last_values())
        calls["theirs"] = rival.read
    products = layer_products(model.vlm.text, work.batch_size * work.prompt_tokens)
    work_flops = flops.reading(model.vlm.text, work.prompt_tokens) * work.batch_size
    return measure(config, work, calls, products, work_flops, against)[0]


class _Endless:
    """Stands for the encoder of an Answerer whose answers do not stop."""

    stop_tokens = (-1,)


def decode(config: Config, work: Work, against: str) -> Result:
    """Greedy answers of `new_tokens` tokens, the prompt's reading included; figures are for one token of the batch."""
    config = without_vision(config)
    model, vlm = config.model_config.vlm, random_params(config, "vlm")["vlm"]
    prompts = random_prompts(config, work.batch_size, work.prompt_tokens)
    answerer = Answerer(model, vlm, _Endless())

    def ours():
        return np.stack(list(answerer.tokens(prompts, Decoding(work.new_tokens))), axis=1)

    calls = {"ours": ours} | reading_calls()
    if against:
        rival = load_rival("qwen2_vl").Reader(model, vlm, prompts)
        if not np.array_equal(mine := ours(), theirs := rival.answer(work.new_tokens)):
            raise UserError(f"ours and the rival's tokens differ: {mine.tolist()} and {theirs.tolist()}")
        calls["theirs"] = lambda: rival.answer(work.new_tokens)
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
    """What one token reads: all layers, and both ends where they are one; of an embedding that is not, one row."""
    ends = text["vocabulary"]
    head = ends.get("lm_head", ends["embedding"])
    return sum(leaf.nbytes for leaf in jax.tree.leaves((text["layers"], head)))


# ---- What they share


def measure(
    config: Config, work: Work, calls: Calls, products: list[Product], work_flops: int, against: str, parts: int = 1
) -> tuple[Result, dict[str, float]]:
    """Times the calls and the products in turn.

    Returns:
      result: figures for one of the call's equal `parts`: ours and theirs in seconds, the limit, the rates.
      seconds: each call's.
    """
    theirs = load_rival("products").product_calls(products) if against in ("torch", "janus") else {}
    calls = (
        calls | product_calls(products, jnp.dtype(config.dtype)) | {f"their {name}": c for name, c in theirs.items()}
    )
    seconds = alternate(calls, work.repeats)
    rate = best_rate(products, seconds)
    limit = work_flops / rate
    result = {"seconds": seconds["ours"] / parts}
    if "theirs" in seconds:
        result |= {"against_seconds": seconds["theirs"] / parts, "ratio": seconds["theirs"] / seconds["ours"]}
    result |= {
        "limit": limit / parts,
        "share_of_limit": limit / seconds["ours"],
        "model_flops": work_flops / parts,
        "matmul_rate": rate,
    }
    if theirs:
        result["against_matmul_rate"] = best_rate(products, {name: seconds[f"their {name}"] for name in theirs})
    return result, seconds


def layer_products(text: TextConfig, rows: int) -> list[Product]:
    """The products of one layer's weights with so many tokens."""
    width, heads, kv_heads = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    shapes = {(width, heads), (width, kv_heads), (heads, width), (width, text.intermediate_size)}
    return [Product(rows, *shape) for shape in sorted(shapes | {(text.intermediate_size, width)})]


def num_tokens(config: Config) -> int:
    rows, columns = config.model_config.generation.grid
    return rows * columns


def without_vision(config: Config) -> Config:
    """No picture is looked at here: a tower of one block leaves room for the rest."""
    vision = dataclasses.replace(config.model.vision, depth=1)
    mesh = dataclasses.replace(config.mesh, expert=1)
    return dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(config.model, vision=vision))


def first_group(config: Config) -> Config:
    """A model of the first group's layers alone, which owns all of flow time."""
    first = config.model_config.generation.layers_of[0]
    text = dataclasses.replace(config.model.text, num_layers=first.stop)
    model = dataclasses.replace(config.model, text=text, num_groups=1, group_sizes=(), interval_edges=())
    return dataclasses.replace(config, model=model, mesh=dataclasses.replace(config.mesh, expert=1))


def random_params(config: Config, *parts: str) -> Params:
    """Random weights in the dtype of the computation, a tree for each layer; of those `parts`, or all."""
    abstract = abstract_params(config)
    abstract = {part: abstract[part] for part in parts or abstract}
    return random_like(jax.eval_shape(latte_flow.unstack, abstract), jnp.dtype(config.dtype))


def random_like(tree: Any, dtype: jnp.dtype = jnp.float32) -> Any:
    """Random arrays of a tree's shapes. Unlike fresh weights none are zero, so that every part of a model counts."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        numbers = rng.random(leaf.shape, np.float32)
        numbers -= 0.5
        if path[-1] == jax.tree_util.DictKey("scale"):
            return jnp.asarray(1 + numbers, dtype)
        numbers *= (12 / leaf.shape[-1]) ** 0.5  # a variance of one over the inputs
        return jnp.asarray(numbers, dtype)

    return jax.tree.map_with_path(draw, tree)


def random_prompts(config: Config, count: int, length: int) -> Prompts:
    """Prompts of text of one length."""
    ids = np.random.default_rng(0).integers(config.model.text.vocab_size, size=(count, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (count, 3, 1))
    return Prompts(jnp.asarray(ids), jnp.ones(ids.shape, bool), jnp.asarray(positions))


def load_rival(name: str) -> ModuleType:
    """Imports one of `tests/rivals`."""
    try:
        return importlib.import_module(f"tests.rivals.{name}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"there is no {error.name}: rivals stand with the tests; run this from the root of a checkout, after "
            "pip install -e '.[test]'"
        ) from error


def must_agree(ours: Any, theirs: np.ndarray) -> None:
    ours = np.asarray(ours, np.float32)
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    if not difference < AGREEMENT:
        raise UserError(f"ours and the rival's outputs differ by {difference:.1e} of their norm; nothing was timed")
