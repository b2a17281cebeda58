"""A stack of layers in one of two forms, with operations that work on both.

Stacked: one tree, whose leaves have a leading axis L; the form for training, sharding and storage. A list: a tree for
each layer; the form for drawing and decoding, because slicing a layer out of a stack inside a compiled loop copies its
weights at every step, which at batch 1 costs more than the layer itself. Code outside this file works with both forms.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

# What a layer keeps for the backward pass: everything, its matrix products, or only its input.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


_row_axes: ContextVar[tuple[str, ...]] = ContextVar("the mesh axes that rows are sharded over", default=())


@contextlib.contextmanager
def rows_over(mesh: AbstractMesh, axes: tuple[str, ...]) -> Iterator[None]:
    """What is traced within it runs on a mesh, with rows sharded over these of its axes; the first is the groups'. It
    is also a decorator."""
    with jax.sharding.use_abstract_mesh(mesh), _over(axes):
        yield


@contextlib.contextmanager
def rows_of_one_group() -> Iterator[None]:
    """Within it, rows are those of one group of several that are computed together."""
    with _over(_row_axes.get()[1:]):
        yield


@contextlib.contextmanager
def _over(axes: tuple[str, ...]) -> Iterator[None]:
    token = _row_axes.set(axes)
    try:
        yield
    finally:
        _row_axes.reset(token)


def by_rows(x: jax.Array) -> jax.Array:
    """Hidden states [B, …], on a mesh sharded by rows and nothing else (see `rows_over`).

    The compiler may otherwise shard them by their width, as weights are: then every device computes all rows, and sums
    of activations cross the mesh instead of weights.
    """
    axes, mesh = _row_axes.get(), jax.sharding.get_abstract_mesh()
    shares = math.prod(mesh.shape[axis] for axis in axes)
    if shares == 1 or x.shape[0] % shares:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *[None] * (x.ndim - 1)))


@dataclasses.dataclass(frozen=True)
class Layers:
    """A view of the data of L layers: weights, keys and values, or modulations. Methods return plain trees, in the same
    form."""

    tree: Any

    @property
    def _is_list(self) -> bool:
        return isinstance(self.tree, list)

    def __getitem__(self, own: slice) -> Any:
        """A slice of the layers."""
        return self.tree[own] if self._is_list else jax.tree.map(lambda x: x[own], self.tree)

    def map(self, function: Callable[[Any], Any]) -> Any:
        """Applies a function to each layer."""
        return [function(layer) for layer in self.tree] if self._is_list else jax.vmap(function)(self.tree)

    def map_arrays(self, function: Callable[[jax.Array], jax.Array]) -> Any:
        """Applies a function to each array of each layer."""
        return self.map(lambda layer: jax.tree.map(function, layer))

    def with_part(self, name: str, layers: Any) -> Any:
        """Adds a part to each layer, which is a dict; `layers` has that part for each layer, in the same form."""
        if self._is_list:
            return [layer | {name: part} for layer, part in zip(self.tree, layers, strict=True)]
        return self.tree | {name: layers}

    def zip(self, *others: Any) -> "Layers":
        """Zips layers into tuples; each of the others has the same form, or is None for all layers."""
        if not self._is_list:
            return Layers((self.tree, *others))
        others = [[None] * len(self.tree) if other is None else other for other in others]
        return Layers(list(zip(self.tree, *others, strict=True)))

    def scan(
        self,
        body: Callable[[Any, Any], tuple[Any, Any]],
        carry: Any,
        remat: str = "none",
        *,
        unrolled: Callable[[Any], Any] = lambda carry: carry,
    ) -> tuple[Any, Any]:
        """Runs `body(carry, layer) -> (carry, output)` over the layers, in order; returns the last carry and the
        outputs. A stacked tree is scanned, a list unrolled.

        Args:
          body: the computation of a layer.
          carry: the first layer's carry.
          remat: what a layer keeps for the backward pass, one of `REMAT_POLICIES`.
          unrolled: converts `carry` for the first layer if layers are unrolled. A scan's carry needs a constant shape;
            an unrolled one does not.
        """
        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=self._is_list)
        if not self._is_list:
            return jax.lax.scan(body, carry, self.tree)
        carry, outputs = unrolled(carry), []
        for layer in self.tree:
            carry, output = body(carry, layer)
            outputs.append(output)
        return carry, outputs

    def unstack(self, release: bool = False) -> list[Any]:
        """Splits a stacked tree into a list of trees with separate arrays.

        With `release`, the memory of each stacked leaf is freed as soon as it is split; the stack is then unusable.
        """
        leaves, tree = jax.tree.flatten(self.tree)
        split = []
        for leaf in leaves:
            split.append(_split(leaf))
            if release:
                jax.block_until_ready(split[-1])
                leaf.delete()
        return [jax.tree.unflatten(tree, layer) for layer in zip(*split, strict=True)]


@jax.jit
def _split(leaf: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(leaf)
