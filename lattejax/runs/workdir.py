"""A run's directory.

config.json           the resolved config
tokenizer/            the tokenizer, in transformers' format
vlm/                  the VLM's weights at the end of the first stage, written once
vlm.json              instead of vlm/, if converted weights are used unchanged: their path and hashes
generation_config.json, of the checkpoint that the run started from: how it decodes
autoencoder.json      the identity of the latents' autoencoder
data.json             the identity of the data set
checkpoints/<stage>/  the stage's latest checkpoints; damaged ones are moved to checkpoints/damaged/
metrics.jsonl         one JSON object per line; also in tensorboard/
samples/              a grid of samples for each evaluation
results.json          the final scores
.run.lease            while a process trains here, see `leases`
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from etils import epath

from lattejax.errors import UserError
from lattejax.files import check_writable, remove_leftovers, resolve_path
from lattejax.leases import one_writer
from lattejax.parallel import hosts


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The paths of a run's files."""

    path: epath.Path

    @classmethod
    def at(cls, path: epath.PathLike) -> "Workdir":
        """Opens a local path, absolute or relative, or a remote one."""
        return cls(resolve_path(path))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the lease on the directory for the one process that writes; removes what killed ones have left.

        Raises:
          UserError: another process writes there, or nobody can.
        """
        if (self.vlm / "config.json").exists():
            raise UserError(f"{self.path} is the directory of a sweep; use another --workdir")
        check_writable(self.path / "config.json", f"--workdir={self.path}")
        with one_writer(self.path / ".run", os.fspath(self.path), hosts.end_all):
            stages = [self.checkpoints(stage) for stage in ("pretrain", "train")]
            for directory in (self.path, self.tokenizer, self.path / "samples", *stages):
                remove_leftovers(directory)
            yield

    @property
    def config(self) -> epath.Path:
        return self.path / "config.json"

    @property
    def tokenizer(self) -> epath.Path:
        return self.path / "tokenizer"

    @property
    def vlm(self) -> epath.Path:
        return self.path / "vlm"

    @property
    def vlm_reference(self) -> epath.Path:
        return self.path / "vlm.json"

    @property
    def autoencoder(self) -> epath.Path:
        return self.path / "autoencoder.json"

    @property
    def data(self) -> epath.Path:
        return self.path / "data.json"

    def checkpoints(self, stage: str) -> epath.Path:
        return self.path / "checkpoints" / stage

    @property
    def metrics(self) -> epath.Path:
        return self.path / "metrics.jsonl"

    def tensorboard(self, stage: str) -> epath.Path:
        return self.path / "tensorboard" / stage

    def image(self, name: str, stage: str, step: int) -> epath.Path:
        return self.path / name / f"{stage}_{step:07d}.png"

    @property
    def results(self) -> epath.Path:
        return self.path / "results.json"
