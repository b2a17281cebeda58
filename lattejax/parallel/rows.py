"""Which device takes which rows of a batch.

Row j of batch n is the same record, with the same noise and the same flow time, on every mesh. Groups take contiguous
blocks of rows. A group's block is split into micro-batches, and those are sharded over the devices that hold the group.

Axes: A micro-batch, K group, b rows of one group's share of a micro-batch.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from lattejax.parallel.mesh import ROW_AXES


@dataclasses.dataclass(frozen=True)
class Rows:
    """How a stream's rows are arranged on the leading axes of its arrays: [A, K, b], or [A, b] without `groups`."""

    batch_size: int
    accumulation: int = 1
    groups: int | None = None  # blocks of rows, one for each group; None: any device takes any row

    @property
    def indices(self) -> Int[np.ndarray, "A b"] | Int[np.ndarray, "A K b"]:
        """The row index at each place of the arranged batch."""
        indices = np.arange(self.batch_size, dtype=np.int32)
        if self.groups is None:
            return rearrange(indices, "(A b) -> A b", A=self.accumulation)
        return rearrange(indices, "(K A b) -> A K b", K=self.groups, A=self.accumulation)

    @property
    def spec(self) -> PartitionSpec:
        """How those leading axes are sharded."""
        return PartitionSpec(None, ROW_AXES) if self.groups is None else PartitionSpec(None, "expert", ROW_AXES[1:])

    @staticmethod
    def flat_sharding(mesh: Mesh) -> NamedSharding:
        """The sharding of rows on one leading axis over all row axes of the mesh."""
        return NamedSharding(mesh, PartitionSpec(ROW_AXES))

    @staticmethod
    def place_flat(mesh: Mesh, tree: Any) -> Any:
        """Shards arrays that every process has over all devices, by rows on the leading axis, whose length must be a
        multiple of `row_shares`."""

        def placed(x):
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, Rows.flat_sharding(mesh), lambda index: x[index])

        return jax.tree.map(placed, tree)

    def sharding(self, mesh: Mesh) -> NamedSharding:
        return NamedSharding(mesh, self.spec)

    def check(self, mesh: Mesh | AbstractMesh, name: str) -> None:
        """Raises `ValueError` unless every device gets an equal share; `name` is the batch size's config key."""
        if self.groups is not None and self.groups % mesh.shape["expert"]:
            raise ValueError(f"mesh.expert={mesh.shape['expert']} does not divide the {self.groups} groups")
        axes = ROW_AXES if self.groups is None else ROW_AXES[1:]
        shares = math.prod(mesh.shape[axis] for axis in axes)
        if self.batch_size % (shares * self.accumulation * (self.groups or 1)):
            parts = [f"{shares} shares of the mesh ({' * '.join(axes)})", f"{self.accumulation} micro-batches"]
            parts += [f"{self.groups} groups"] * (self.groups is not None)
            raise ValueError(f"{name}={self.batch_size} must be a multiple of {' times '.join(parts)}")

    def of_process(self, mesh: Mesh) -> list[int]:
        """The sorted indices of the rows that this process's devices take."""
        indices = self.indices
        slices = self.sharding(mesh).addressable_devices_indices_map(indices.shape).values()
        return np.unique(np.concatenate([indices[index].ravel() for index in slices])).tolist()

    def place(self, mesh: Mesh, batch: Any) -> Any:
        """Makes arrays over the mesh from the rows that this process has read: those of `of_process`, on the leading
        axis of each leaf."""
        indices, own = self.indices, np.asarray(self.of_process(mesh))
        lead = indices.ndim

        def placed(leaf):
            leaf = np.asarray(leaf)

            def shard(index):
                return leaf[np.searchsorted(own, indices[index[:lead]])]

            shape = (*indices.shape, *leaf.shape[1:])
            return jax.make_array_from_callback(shape, self.sharding(mesh), shard)

        return jax.tree.map(placed, batch)

    def abstract(self, mesh: Mesh, batch: Any) -> Any:
        """Describes the arrays that `place` makes of a complete batch."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*self.indices.shape, *x.shape[1:]), x.dtype, sharding=self.sharding(mesh)),
            batch,
        )
