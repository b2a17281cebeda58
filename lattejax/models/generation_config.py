"""Geometry and options of the generation pathway."""

import dataclasses
import itertools

from lattejax.flow.intervals import Intervals
from lattejax.models.conditioning import CONDITIONINGS
from lattejax.models.generation_layer import LayerConfig
from lattejax.models.text import TextConfig

REPLICA_INITS = ("vlm", "random")
LATENT_POSITIONS = ("sincos", "none")
PREDICTIONS = ("velocity", "x")


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Geometry of the generation pathway; `text` is the VLM's, `latent_shape` the autoencoder's (rows, columns, C).

    The groups are equal in layers and in flow time unless `group_sizes` (summing to L) or `interval_edges` (rising from
    0 to 1) define others. `latent_position` is the position embedding of image tokens, besides M-RoPE: "sincos", a
    fixed 2-D sine-cosine table added to the embedded latents, or "none". `conditioning` is one of
    `models.conditioning`. `prediction` is what the network gives: the "velocity", or "x", the clean latents. With
    `shared_ends=False` each group has an embedding, a time embedding and a head of its own.
    """

    text: TextConfig
    latent_shape: tuple[int, int, int]
    num_groups: int = 4
    group_sizes: tuple[int, ...] = ()
    interval_edges: tuple[float, ...] = ()
    residual_attention: str = "probabilities"
    residual_gate: str = "head"
    replica_init: str = "vlm"
    latent_position: str = "sincos"
    conditioning: str = "time"
    prediction: str = "velocity"
    shared_ends: bool = True
    patch_size: int = 1

    def __post_init__(self):
        layers = self.text.num_layers
        if self.group_sizes:
            if len(self.group_sizes) != self.num_groups or min(self.group_sizes) < 1:
                raise ValueError(
                    f"group_sizes={self.group_sizes} must be num_groups={self.num_groups} positive integers"
                )
            if sum(self.group_sizes) != layers:
                raise ValueError(
                    f"group_sizes={self.group_sizes} sum to {sum(self.group_sizes)}, not to the {layers} layers of the "
                    "language model"
                )
        elif self.num_groups < 1 or layers % self.num_groups:
            fitting = [k for k in range(1, layers + 1) if layers % k == 0]
            raise ValueError(
                f"num_groups={self.num_groups} does not divide the {layers} layers of the language model; use one of "
                f"{fitting}, or give group_sizes"
            )
        if self.intervals.num_groups != self.num_groups:
            raise ValueError(
                f"interval_edges={self.interval_edges} make {self.intervals.num_groups} intervals; num_groups="
                f"{self.num_groups} needs {self.num_groups + 1} edges"
            )
        for name, known in (
            ("replica_init", REPLICA_INITS),
            ("latent_position", LATENT_POSITIONS),
            ("conditioning", CONDITIONINGS),
            ("prediction", PREDICTIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {list(known)}")
        if self.latent_position == "sincos" and self.text.hidden_size % 4:
            raise ValueError(
                f"latent_position='sincos' needs a hidden_size that is a multiple of 4 (sines and cosines of two "
                f"axes), not {self.text.hidden_size}; use 'none'"
            )
        if self.latent_shape[0] % self.patch_size or self.latent_shape[1] % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide latents of shape {self.latent_shape}")
        _ = self.layer  # runs its own checks

    @property
    def intervals(self) -> Intervals:
        """Which group owns which flow time."""
        return Intervals(self.interval_edges) if self.interval_edges else Intervals.equal(self.num_groups)

    @property
    def layers_of(self) -> tuple[slice, ...]:
        """Each group's slice of the L layers."""
        sizes = self.group_sizes or (self.text.num_layers // self.num_groups,) * self.num_groups
        ends = tuple(itertools.accumulate(sizes))
        return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.latent_shape[0] // self.patch_size, self.latent_shape[1] // self.patch_size

    @property
    def token_dim(self) -> int:
        """The number of latent values in one image token."""
        return self.latent_shape[2] * self.patch_size**2

    @property
    def layer(self) -> LayerConfig:
        return LayerConfig(self.text, self.residual_attention, self.residual_gate)
