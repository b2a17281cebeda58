"""The sections of a config: for every key its default, its meaning, and the check on its value.

Defaults are the paper's setting: a frozen Qwen2-VL-2B, and 4 groups of 7 layers that draw 256-pixel images with DC-AE.
What the paper does not state (learning rate, betas, clipping, average, density) is our choice.
"""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from lattejax.flow.densities import Density, LogitNormal, Shifted, Uniform
from lattejax.flow.schedule import Sampling
from lattejax.models.autoencoders import PIXELS, Autoencoder
from lattejax.models.layers import REMAT_POLICIES
from lattejax.models.pixels import PixelConfig
from lattejax.models.text import TextConfig
from lattejax.models.vision import VisionConfig

DECAYS = ("none", "cosine", "linear")
PICTURES = ("tfds", "folder", "digits")
PROMPTS = ("captions", "pictures")
DENSITIES = ("uniform", "logit_normal", "shifted")
BEFORE = "before"  # in the metadata of a key


def added(default: Any, *, before: Any) -> Any:
    """A key that was added later; the value `before` keeps the earlier behaviour."""
    return dataclasses.field(default=default, metadata={BEFORE: before})


class Settings(dict):
    """A free-form part of a config: {name: {setting: value}}. Never modified."""

    def __hash__(self):
        return hash(json.dumps(self, sort_keys=True))


def check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r} must be {expected}")


def check_one_of(name: str, value: str, known: Iterable[str]) -> None:
    check(name, value, value in known, f"one of {list(known)}")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The number of devices on each axis; one may be -1: all remaining devices. A run may resume on another mesh."""

    expert: int = 1  # the groups' layers, their optimizer state and their share of a batch; divides model.num_groups
    data: int = -1  # a batch's rows
    fsdp: int = 1  # rows, and also weights and optimizer state
    tensor: int = 1  # heads and hidden units

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            check(name, size, size > 0 or size == -1, "positive, or -1 for all remaining devices")
        if list(dataclasses.asdict(self).values()).count(-1) > 1:
            raise ValueError(f"{dataclasses.asdict(self)} has two axes of -1; only one may be -1")


@dataclasses.dataclass(frozen=True)
class Model:
    variant: str = "couple"  # a frozen VLM beside trained replicas of its layers; "blend": shared layers, all trained
    num_groups: int = 4  # K, the timestep-expert groups; divides text.num_layers
    group_sizes: tuple[int, ...] = ()  # layers of each group, the noisiest first; empty: equal
    interval_edges: tuple[float, ...] = ()  # the K + 1 edges of the groups' flow times, from 0 to 1; empty: equal
    residual_attention: str = "probabilities"  # what a layer adds from the previous layer's map; or "logits", or "none"
    residual_gate: str = "head"  # one gate for each head, or one for the "layer"
    replica_init: str = "vlm"  # replicas of the VLM's layers start as copies, or at "random"
    # Position embedding of image tokens, besides M-RoPE: a fixed sine-cosine table, or "none".
    latent_position: str = added("sincos", before="none")
    conditioning: str = added("time", before="time")  # what velocities are conditioned on, see models/conditioning.py
    patch_size: int = 1  # side of the square of latents in one image token
    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()


@dataclasses.dataclass(frozen=True)
class Images:
    """The pictures that `lattejax.encode` turns into latents; training ignores this section."""

    source: str = "folder"  # image files with captions; "tfds", a data set of tensorflow-datasets; "digits"
    name: str = "pictures"  # the folder; or the data set's name (with ":version", if wanted)
    data_dir: str = ""  # where tensorflow-datasets keeps its data; empty: its default
    train: str = "train[500:]"  # the training split, in tensorflow-datasets' notation; a folder has only "train"
    test: str = "train[:500]"  # the held-out split
    image_key: str = ""  # the data set's feature with the picture
    caption_key: str = ""  # the feature with its prompt: texts or class labels
    flip: bool = False  # store each picture a second time, mirrored
    batch_size: int = 256  # pictures encoded at a time by each process
    shard_pictures: int = 10_000  # pictures per file; encoding resumes at the start of a file
    most_unreadable: int = 100  # unreadable pictures that may be skipped
    threads: int = 16  # threads that read and crop

    def __post_init__(self):
        check_one_of("source", self.source, PICTURES)
        for name in ("batch_size", "shard_pictures", "threads"):
            check(name, getattr(self, name), getattr(self, name) > 0, "positive")
        check("most_unreadable", self.most_unreadable, self.most_unreadable >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class Data:
    source: str = "latents"  # the output of `lattejax.encode`; "digits", scikit-learn's handwritten digits
    latents: str = "latents"  # the directory of the latents; empty for the digits
    prompts: str = "captions"  # of the drawings; or "pictures": each prompt is a picture with one request
    autoencoder: str = "weights/dc_ae"  # the directory of a converted autoencoder; or "pixels": latents are grey pixels
    image_size: int = 256  # side of the drawn images, in pixels
    latent_shape: tuple[int, int, int] = (8, 8, 32)  # rows, columns and channels of the autoencoder's latents
    prompt_length: int = 128  # tokens that image prompts are padded to
    answer_length: int = 512  # tokens that a question with its answer is padded to
    min_pixels: int = 56 * 56  # bounds on the area to which the VLM's image processor resizes its inputs
    max_pixels: int = 512 * 512
    threads: int = 1  # reader threads besides the training loop

    def __post_init__(self):
        check_one_of("prompts", self.prompts, PROMPTS)
        check("image_size", self.image_size, self.image_size > 0, "positive")
        check("threads", self.threads, self.threads > 0, "positive")
        if self.autoencoder == PIXELS:
            shape = Autoencoder(PixelConfig()).latent_shape(self.image_size)
            check("latent_shape", self.latent_shape, self.latent_shape == shape, f"{shape} for bare pixels")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    path: str = ""  # a directory with a Hugging Face tokenizer; empty: train one on the captions and questions
    vocab_size: int = 384  # maximum number of entries if it is trained


@dataclasses.dataclass(frozen=True)
class Stage:
    """The keys that both stages of training share. The defaults are the VLM's: taken unchanged, with no steps."""

    # A finished run's workdir with this stage's initial weights (for the first stage also converted weights);
    # empty: random weights.
    init_from: str = ""
    steps: int = 0
    batch_size: int = 1
    accumulation: int = 1  # micro-batches that one batch is split into
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    decay: str = "none"  # of the learning rate, to zero at the last step; or "cosine", "linear"
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # the gradient's global norm is clipped to this
    ema_decay: float = 0.0  # 0: the average is the weights themselves
    remat: str = "none"  # what layers recompute in the backward pass; or "dots" (all but matrix products), "full"
    unroll: bool = False  # layers unrolled, not scanned: longer compilation, faster steps if layers are small

    def __post_init__(self):
        check_one_of("decay", self.decay, DECAYS)
        check_one_of("remat", self.remat, REMAT_POLICIES)
        check("steps", self.steps, self.steps >= 0, "at least 0")
        check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        check("batch_size", self.batch_size, self.batch_size > 0, "positive")
        check("accumulation", self.accumulation, self.accumulation > 0, "positive")
        check("clip_norm", self.clip_norm, self.clip_norm > 0, "positive")
        check("ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "in [0, 1)")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of accumulation={self.accumulation}")


@dataclasses.dataclass(frozen=True)
class GenerationStage(Stage):
    steps: int = 240_000
    batch_size: int = 2048
    learning_rate: float = 2e-4
    warmup_steps: int = 5_000
    ema_decay: float = 0.9999
    remat: str = "dots"
    prompt_dropout: float = 0.1  # probability of training on the empty prompt, which guidance needs
    share_contexts: bool = (
        True  # one context per distinct caption, not per row (Couple: in advance; Blend: in each step)
    )
    density: str = "uniform"  # of flow times; or "logit_normal", with density_mean and _std; "shifted", with _shift
    density_mean: float = 0.0
    density_std: float = 1.0
    density_shift: float = 1.0
    stratified: bool = True  # equal shares of a batch for all groups; otherwise t decides, at K times the cost
    answer_batch_size: int = 256  # Blend: questions in each step, besides batch_size images; Couple trains on none
    answer_weight: float = 1.0  # Blend: weight of the answers' loss; the flow's is 1

    def __post_init__(self):
        super().__post_init__()
        check("prompt_dropout", self.prompt_dropout, 0 <= self.prompt_dropout <= 1, "in [0, 1]")
        check_one_of("density", self.density, DENSITIES)
        check("density_std", self.density_std, self.density_std > 0, "positive")
        check("density_shift", self.density_shift, self.density_shift > 0, "positive")
        check("answer_batch_size", self.answer_batch_size, self.answer_batch_size > 0, "positive")
        check("answer_weight", self.answer_weight, self.answer_weight > 0, "positive")

    @property
    def flow_density(self) -> Density:
        return {
            "uniform": Uniform(),
            "logit_normal": LogitNormal(self.density_mean, self.density_std),
            "shifted": Shifted(self.density_shift),
        }[self.density]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    every: int = 10_000  # steps between evaluations; 0: only at the end of a stage
    examples: int = 512  # held-out examples for the flow loss and the answers; 0: all of them
    # For the sample grid, if data.prompts="captions".
    prompts: tuple[str, ...] = (
        "a red bicycle leaning against a white wall",
        "a bowl of soup on a wooden table, seen from above",
    )
    images_per_prompt: int = 8
    sample_steps: int = 40
    guidance: float = 5.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # only steps that start in it are guided
    solver: str = "euler"  # or "heun"
    shift: float = 1.0  # of the step times; 1: no shift, below 1: more steps near the noise
    batch_size: int = 64  # images per sampling call
    # The scores to take: {name: settings}, see evaluation/registry.py.
    evaluators: Settings = Settings(held_out_loss={"at": "training"}, samples={"at": "training"})

    def __post_init__(self):
        check("every", self.every, self.every >= 0, "at least 0")
        check("examples", self.examples, self.examples >= 0, "at least 0")
        check("prompts", self.prompts, len(self.prompts) > 0 and all(map(str.strip, self.prompts)), "non-empty texts")
        for name in ("images_per_prompt", "sample_steps", "batch_size"):
            check(name, getattr(self, name), getattr(self, name) > 0, "positive")
        _ = self.sampling  # runs its own checks

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.sample_steps, self.guidance, self.guidance_interval, self.solver, self.shift)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    every: int = 2_000  # steps between checkpoints; the last step and every evaluation also make one
    keep: int = 3  # the number of latest checkpoints to keep
    keep_every: int = 20_000  # checkpoints at multiples of this step are kept too; 0: none

    def __post_init__(self):
        check("every", self.every, self.every > 0, "positive")
        check("keep", self.keep, self.keep > 0, "positive")
        check("keep_every", self.keep_every, self.keep_every >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class Profile:
    start: int = 100  # the generation stage's step at which the profiler starts
    steps: int = 0  # how many steps it records; 0: none
