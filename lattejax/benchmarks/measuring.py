"""What the benchmarks share: random weights at a config's geometry, and timing beside the machine's limit.

The limit of a computation is the time that its matrix products would take at the best rate that any one of the model's
products reaches alone, or for decoding the time in which the weights can be read once; of small models it is no limit,
since a small product takes longer to start than to compute. `baselines` are renderings of the same in PyTorch, which is
no requirement of this package; their outputs are compared with ours before anything is timed.
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
from lattejax.errors import UserError, need
from lattejax.models import latte_flow
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import Prompts
from lattejax.models.text import TextConfig
from lattejax.runs.shapes import abstract_params

AGREEMENT = 1e-3  # between our float32 outputs and a baseline's: the norm of the difference over that of theirs
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


def measure(
    config: Config, work: Work, calls: Calls, products: list[Product], work_flops: int, against: str, parts: int = 1
) -> tuple[Result, dict[str, float]]:
    """Times the calls and the products in turn.

    Returns:
      result: figures for one of the call's equal `parts`: ours and theirs in seconds, the limit, the rates.
      seconds: each call's.
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


def load_baseline(name: str) -> ModuleType:
    """Imports one of `benchmarks.baselines`; raises `UserError` where PyTorch is not installed."""
    need("torch", "test", "--against")
    return importlib.import_module(f"lattejax.benchmarks.baselines.{name}")


def must_agree(ours: Any, theirs: np.ndarray) -> None:
    ours = np.asarray(ours, np.float32)
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    if not difference < AGREEMENT:
        raise UserError(f"ours and the baseline's outputs differ by {difference:.1e} of their norm; nothing was timed")
