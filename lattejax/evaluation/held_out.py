"""The loss on held-out rows, in batches."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from lattejax.configuration import Config
from lattejax.data.examples import Drawings, Source
from lattejax.errors import UserError
from lattejax.evaluation.protocol import Report, Subject
from lattejax.models.functional import Params
from lattejax.models.layers import rows_over
from lattejax.objectives.flow import FlowLoss, Frozen
from lattejax.parallel import hosts
from lattejax.parallel.mesh import ROW_AXES, batches_of
from lattejax.parallel.rows import Rows


@dataclasses.dataclass(frozen=True)
class HeldOutFlowLoss:
    """The flow-matching loss on held-out drawings: over all of flow time, and in each group's interval."""

    lengths: tuple[float, ...]
    judges = "pathway"
    named_by = ("",)

    @classmethod
    def open(cls, config: Config, source: Source) -> "HeldOutFlowLoss":
        return cls(tuple(config.model_config.generation.intervals.lengths))

    def __call__(self, subject: Subject) -> Report:
        losses = subject.held_out_losses
        return Report({"held_out_loss": np.sum(losses * np.asarray(self.lengths)), "held_out_loss_per_group": losses})


class HeldOutLoss:
    """Each group's loss on the first eval.examples held-out rows, in batches of eval.batch_size, over the mesh."""

    def __init__(self, config: Config, loss: FlowLoss, drawings: Drawings, make_batch: Callable, mesh: Mesh):
        self._drawings, self._make_batch, self._mesh = drawings, make_batch, mesh
        self._total = min(len(drawings), config.eval.examples or len(drawings))
        self._batch_size = config.eval.batch_size
        self._losses = jax.jit(rows_over(mesh.abstract_mesh, ROW_AXES)(loss.held_out))

    def __call__(self, trained: Params, frozen: Frozen) -> Float[np.ndarray, "K"]:
        """Returns the mean over rows [K], summed in float64; raises `UserError` if there are none."""
        if not self._total:
            raise UserError("there are no held-out drawings whose loss could be measured")
        losses = []
        for rows in batches_of(self._total, self._batch_size, self._mesh):
            images = self._make_batch(self._drawings.__getitems__(rows.tolist()), rows.tolist())
            images, index = Rows.place_flat(self._mesh, (images, rows))
            losses.append(hosts.fetch(self._losses(trained, frozen, images, index, self._total)))
        return np.concatenate(losses, axis=1)[:, : self._total].mean(axis=1, dtype=np.float64)
