"""Orbax checkpoints: what a killed run goes on from, and what sampling and chatting read.

A stage's checkpoint has four items: `params`, `ema` and `optimizer`, arrays, and `progress`, a JSON object with the
data iterator's state. Each is read on its own, so that sampling reads the average alone. Orbax commits a checkpoint as
a whole: one that a kill has cut short is never taken for a checkpoint.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lattejax.errors import UserError


def like(tree: Any) -> Any:
    """Describes a tree's arrays by shape, dtype and, where they have one, sharding: what a restore fills in."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here), tree
    )


class Checkpoints:
    """One stage's checkpoints in a directory, local or remote; writing goes on in the background."""

    def __init__(self, directory: epath.Path, *, keep: int | None = None):
        """Opens a directory; `keep` is how many checkpoints stay there when new ones are written, None: all."""
        self._manager = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep))

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, arrays: dict[str, Any], progress: dict[str, Any]) -> None:
        """Starts writing a checkpoint; the arrays may be donated as soon as this returns."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        self._manager.save(step, args=ocp.args.Composite(**items, progress=ocp.args.JsonSave(progress)))

    def restore(self, step: int, **targets: Any) -> dict[str, Any]:
        """Reads the named arrays into trees like `targets`, and `progress`."""
        items = {name: ocp.args.StandardRestore(like(tree)) for name, tree in targets.items()}
        return dict(self._manager.restore(step, args=ocp.args.Composite(**items, progress=ocp.args.JsonRestore())))

    def close(self) -> None:
        """Waits for the last checkpoint to be written."""
        self._manager.wait_until_finished()
        self._manager.close()


def is_complete(path: epath.Path) -> bool:
    """Whether `save_weights` has finished there."""
    return path.exists() and ocp.utils.is_checkpoint_finalized(path)


def save_weights(path: epath.Path, params: Any) -> None:
    """Writes a tree of weights, whole or not at all."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params)


def check_shapes(theirs: Any, ours: Any, name: str) -> None:
    """Raises `UserError` unless two trees have the same paths, with the same shapes."""
    have, want = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (theirs, ours)
    )
    wrong = [
        f"{path}: {have.get(path)}, not {want.get(path)}" for path in have | want if have.get(path) != want.get(path)
    ]
    if wrong:
        raise UserError(f"{name} do not fit the config: {'; '.join(wrong[:5])}{'; …' if wrong[5:] else ''}")


def load_weights(path: epath.Path, target: Any) -> Any:
    """Reads weights into a tree like `target`; raises `UserError` if names or shapes differ, or files are gone."""
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(path, like(target))
        except (ValueError, KeyError) as error:
            raise UserError(f"the weights in {path} do not fit the config: {error}") from error
        except OSError as error:
            raise UserError(f"the weights in {path} cannot be read: {error}") from error
