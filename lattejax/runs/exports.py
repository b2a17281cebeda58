"""A model's weights as safetensors: one tensor for each of our arrays, named by its path with dots for slashes."""

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
    """Writes weights, in the dtype they have."""
    flat = traverse_util.flatten_dict(params, sep=".")
    dealt = shards.split({name: array.nbytes for name, array in flat.items()})
    shards.write(directory, ({name: np.asarray(flat[name]) for name in names} for names in dealt), len(dealt))


def read(directory: epath.Path, target: Params, only: str = "") -> Params:
    """Reads weights into a tree of the paths, shapes and dtypes of `target`; `only` names a part of it to be read.

    Raises:
      UserError: names or shapes of the whole differ, or a file is missing or cut short.
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
