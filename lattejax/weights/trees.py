"""Trees of weights in files (Orbax): written atomically, and read to the requested devices."""

import contextlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lattejax.errors import UserError, first_line
from lattejax.files import check_files, check_space
from lattejax.parallel import hosts
from lattejax.weights import layouts


def like(tree: Any) -> Any:
    """Describes a tree's arrays by shape, dtype and, if they have one, sharding: the target of a restore."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here), tree
    )


def stored_target(path: epath.Path, target: Any) -> Any:
    """Describes a tree with the shapes that it has at `path`; see `layouts`."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return layouts.as_stored(target, layouts.shapes(handler.metadata(path)))


def byte_count(tree: Any) -> int:
    """The bytes of all of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def is_complete(path: epath.Path) -> bool:
    """Whether `save_weights` has finished at `path`."""
    return path.exists() and ocp.utils.is_checkpoint_finalized(path)


def save_weights(path: epath.Path, params: Any) -> None:
    """Writes a tree of weights atomically; raises `UserError` if the disk has no room for them."""
    if hosts.is_first():
        check_space(path, byte_count(params), f"{path}, with its weights,")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params, force=True)  # over what a killed process has left in remote storage


def check_shapes(theirs: Any, ours: Any, name: str) -> None:
    """Raises `UserError` unless two trees have the same paths, with the same shapes."""
    have, want = layouts.shapes(theirs), layouts.shapes(ours)
    wrong = [
        f"{path}: {have.get(path)}, not {want.get(path)}" for path in have | want if have.get(path) != want.get(path)
    ]
    if wrong:
        raise UserError(f"{name} do not fit the config: {'; '.join(wrong[:5])}{'; …' if wrong[5:] else ''}")


def load_weights(path: epath.Path, target: Any) -> Any:
    """Reads weights into a tree like `target`; raises `UserError` if names or shapes differ, or files are missing."""
    target = like(target)
    if not is_complete(path):
        raise UserError(f"there are no complete weights in {path}")
    check_files(path, deep=True)
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return layouts.as_wanted(checkpointer.restore(path, stored_target(path, target)), target)
        except (ValueError, KeyError) as error:
            raise UserError(f"the weights in {path} do not fit the config: {error}") from error
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files
            raise UserError(f"the weights in {path} cannot be read: {first_line(error)}") from error
