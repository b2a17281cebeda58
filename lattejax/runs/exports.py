"""A model's weights as safetensors: one tensor for each of our arrays, named by its path, with dots for slashes."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from lattejax.models.functional import Params
from lattejax.weights import layouts, shards
from lattejax.weights.shards import Shards
from lattejax.weights.trees import check_shapes


def write(directory: epath.Path, params: Params) -> None:
    """Writes weights, in their dtypes."""
    flat = traverse_util.flatten_dict(params, sep=".")
    files = shards.split({name: array.nbytes for name, array in flat.items()})
    shards.write(directory, ({name: np.asarray(flat[name]) for name in names} for names in files), len(files))


def read(directory: epath.Path, target: Params, only: str = "") -> Params:
    """Reads weights into a tree with the paths, shapes and dtypes of `target`; `only` is a prefix of the names to read.

    Raises:
      UserError: names or shapes in the complete `target` differ, or a file is missing or truncated.
    """
    stored = Shards.open(directory)
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in stored.shapes.items()}
    shapes = traverse_util.unflatten_dict(shapes, sep=".")
    check_shapes(shapes, layouts.as_stored(target, layouts.shapes(shapes)), f"the weights in {directory}")
    arrays = {
        name: jnp.asarray(stored.read(name).reshape(array.shape), array.dtype)
        for name, array in traverse_util.flatten_dict(target, sep=".").items()
        if name.startswith(only)
    }
    return traverse_util.unflatten_dict(arrays, sep=".")
