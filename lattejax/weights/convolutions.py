"""Weights of convolutional networks whose modules have the checkpoint's names: PyTorch's tensors to our trees."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lattejax.models.functional import Params
from lattejax.weights import shards

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def assemble(abstract: Params, shapes: Mapping, read_tensor: Callable[[str], np.ndarray], source: Any) -> Params:
    """Returns float32 weights for a network.

    Args:
      abstract: the network's weights or their descriptions.
      shapes: the shape of each stored tensor.
      read_tensor: reads one.
      source: what they belong to, for messages.

    Raises:
      UserError: a tensor is missing, unexpected or of another shape.
    """
    paths = traverse_util.flatten_dict(abstract, sep="/")
    names = {path: _name(path) for path in paths}
    shards.check_tensors(shapes, {names[path]: _to_torch(array.shape) for path, array in paths.items()}, source)
    weights = {path: jnp.asarray(_from_torch(read_tensor(name)), jnp.float32) for path, name in names.items()}
    return traverse_util.unflatten_dict(weights, sep="/")


def _name(path: str) -> str:
    module, leaf = path.rsplit("/", 1)
    return f"{module.replace('/', '.')}.{LEAVES[leaf]}"


def _to_torch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[height, width, in, out] becomes PyTorch's [out, in, height, width], and [in, out] its [out, in]."""
    return (*shape[::-1][:2], *shape[:-2])


def _from_torch(tensor: np.ndarray) -> np.ndarray:
    return np.moveaxis(tensor, (0, 1), (-1, -2)) if tensor.ndim > 1 else tensor
