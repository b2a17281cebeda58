"""Shared by the benchmarks: random weights with a config's geometry, and timing against the machine's roofline.

The limit (roofline) of a computation is the time that its matrix products would take at the best rate that any of the
model's products reaches alone; for decoding, the time to read the weights once. For small models it is not meaningful,
because a small product takes longer to launch than to compute. `baselines` are PyTorch versions of the same
computation; PyTorch is not a requirement of this package. Their outputs are compared with ours before any timing.
"""

import dataclasses
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lattejax.benchmarks.speed import Calls, Product, alternate, best_rate, product_calls
from lattejax.configuration import Config
from lattejax.errors import UserError, require
from lattejax.models import latte_flow
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import Prompts
from lattejax.models.text import TextConfig
from lattejax.runs.shapes import abstract_params

AGREEMENT = 1e-3  # between our float32 outputs and a baseline's: the norm of the difference over that of theirs
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """The amount of work to measure."""

    batch_size: int
    prompt_tokens: int
    steps: int  # of a sampling call
    guidance: float
    new_tokens: int  # to decode
    repeats: int

    @property
    def rows(self) -> int:
        """Rows of a sampling step: with guidance, an image has two."""
        return self.batch_size * (1 if self.guidance == 1 else 2)


def measure(
    config: Config, work: Work, calls: Calls, products: list[Product], work_flops: int, against: str, parts: int = 1
) -> tuple[Result, dict[str, float]]:
    """Times the calls and the products, alternating.

    Returns:
      result: figures for one of the call's equal `parts`: seconds of ours and the baseline's, the limit, the rates.
      seconds: the seconds of each call.
    """
    theirs = load_baseline("products").product_calls(products) if against in ("torch", "janus") else {}
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
    """The products of one layer's weights with `rows` tokens."""
    width, heads, kv_heads = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    shapes = {(width, heads), (width, kv_heads), (heads, width), (width, text.intermediate_size)}
    return [Product(rows, *shape) for shape in sorted(shapes | {(text.intermediate_size, width)})]


def num_tokens(config: Config) -> int:
    rows, columns = config.model_config.generation.grid
    return rows * columns


def without_vision(config: Config) -> Config:
    """The config with a vision tower of one block, to save memory, as no benchmark reads images."""
    vision = dataclasses.replace(config.model.vision, depth=1)
    mesh = dataclasses.replace(config.mesh, expert=1)
    return dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(config.model, vision=vision))


def first_group(config: Config) -> Config:
    """A model of only the first group's layers, as one group that owns all flow times."""
    first = config.model_config.generation.layers_of[0]
    text = dataclasses.replace(config.model.text, num_layers=first.stop)
    alone = dict(num_groups=1, group_sizes=(), interval_edges=(), shared_ends=True)
    model = dataclasses.replace(config.model, text=text, **alone)
    stage = dataclasses.replace(config.train, clip_by="model", interval_overlap=0.0)
    return dataclasses.replace(config, model=model, train=stage, mesh=dataclasses.replace(config.mesh, expert=1))


def random_params(config: Config, *parts: str) -> Params:
    """Random weights in the dtype of the computation, a tree for each layer; only the given `parts`, or all."""
    abstract = abstract_params(config)
    abstract = {part: abstract[part] for part in parts or abstract}
    return random_like(jax.eval_shape(latte_flow.unstack, abstract), jnp.dtype(config.dtype))


def random_like(tree: Any, dtype: jnp.dtype = jnp.float32) -> Any:
    """Random arrays of a tree's shapes. Unlike initial weights none are zero, so that every part of a model matters."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.random(leaf.shape, np.float32)
        values -= 0.5
        if path[-1] == jax.tree_util.DictKey("scale"):
            return jnp.asarray(1 + values, dtype)
        values *= (12 / leaf.shape[-1]) ** 0.5  # a variance of one over the inputs
        return jnp.asarray(values, dtype)

    return jax.tree.map_with_path(draw, tree)


def random_prompts(config: Config, count: int, length: int) -> Prompts:
    """Text prompts of one length."""
    ids = np.random.default_rng(0).integers(config.model.text.vocab_size, size=(count, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (count, 3, 1))
    return Prompts(jnp.asarray(ids), jnp.ones(ids.shape, bool), jnp.asarray(positions))


def load_baseline(name: str) -> ModuleType:
    """Imports one of `benchmarks.baselines`; raises `UserError` if PyTorch is not installed."""
    require("torch", "test", "--against")
    return importlib.import_module(f"lattejax.benchmarks.baselines.{name}")


def must_agree(ours: Any, theirs: np.ndarray) -> None:
    ours = np.asarray(ours, np.float32)
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    if not difference < AGREEMENT:
        raise UserError(f"our outputs and the baseline's differ by {difference:.1e} of their norm; nothing was timed")
