"""A stack of layers, in one of two forms, and what is done with either.

Stacked: one tree, whose leaves have a leading axis L. So layers are trained, sharded and stored. A list: a tree for
each layer. So they draw and decode, because slicing a layer out of a stack inside a compiled loop copies its weights at
every step, which at batch 1 costs more than the layer itself. Nothing outside this file asks which of the two it has.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

# What a layer keeps for the backward pass: everything, its matrix products, or only its input.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Layers:
    """A view of what stands for each of L layers: weights, keys and values, modulations. Methods return plain trees, in
    the form that this one has."""

    tree: Any

    @property
    def _is_list(self) -> bool:
        return isinstance(self.tree, list)

    def __getitem__(self, own: slice) -> Any:
        """Some of the layers."""
        return self.tree[own] if self._is_list else jax.tree.map(lambda x: x[own], self.tree)

    def map(self, function: Callable[[Any], Any]) -> Any:
        """What a function makes of each layer."""
        return [function(layer) for layer in self.tree] if self._is_list else jax.vmap(function)(self.tree)

    def map_arrays(self, function: Callable[[jax.Array], jax.Array]) -> Any:
        """What a function makes of each array of each layer."""
        return self.map(lambda layer: jax.tree.map(function, layer))

    def with_part(self, name: str, layers: Any) -> Any:
        """The layers, dicts, with one more part each; `layers` has it for each, in the same form."""
        if self._is_list:
            return [layer | {name: part} for layer, part in zip(self.tree, layers, strict=True)]
        return self.tree | {name: layers}

    def zip(self, *others: Any) -> "Layers":
        """Layers of tuples; each of the others has the same form, or is None for all layers."""
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
        """Runs `body(carry, layer) -> (carry, output)` through the layers, in order; returns the last carry, and the
        outputs of all. A stacked tree is scanned, a list unrolled.

        Args:
          body: what a layer does.
          carry: what the first layer is given.
          remat: what a layer keeps for the backward pass, one of `REMAT_POLICIES`.
          unrolled: makes of `carry` what the first layer is given where layers are unrolled. A scan's carry has one
            shape throughout; there it need not.
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
        """Splits a stacked tree into a list, each leaf an array of its own.

        With `release` each stacked leaf's memory is given back as soon as it is split, and the stack cannot be used
        again.
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
