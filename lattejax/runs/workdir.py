"""A run's directory.

config.json           the resolved config
tokenizer/            the tokenizer, as transformers writes it
vlm/                  the VLM's weights as the first stage ends with them, written once
vlm.json              instead of them, where converted weights are taken as they are: where those are, and their hashes
autoencoder.json      which autoencoder the latents are of
data.json             which data set the run is trained on
checkpoints/<stage>/  the stage's latest checkpoints; in checkpoints/damaged/ what was found damaged
metrics.jsonl         one JSON object a line; also in tensorboard/
samples/              a grid of samples for each evaluation
results.json          the final scores
"""

import dataclasses

from etils import epath

from lattejax.files import located


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Where a run keeps its files."""

    path: epath.Path

    @classmethod
    def at(cls, path: epath.PathLike) -> "Workdir":
        """Takes a local path, also a relative one, or a remote one."""
        return cls(located(path))

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
