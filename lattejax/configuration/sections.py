"""The sections of a config: for every key its default, what it means, and the check on its value.

Defaults are those of the paper's setting: Qwen2-VL-2B, frozen, beside 4 groups of 7 layers that draw 256 pixels through
DC-AE. What the paper does not state (learning rate, betas, clipping, average, density) is ours.
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
    """A key that configs did not have from the start; without it, the code did what it does now with `before`."""
    return dataclasses.field(default=default, metadata={BEFORE: before})


class Settings(dict):
    """A part of a config whose keys are not known here: {name: {setting: value}}. Never changed."""

    def __hash__(self):
        return hash(json.dumps(self, sort_keys=True))


def check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r} must be {expected}")


def check_one_of(name: str, value: str, known: Iterable[str]) -> None:
    check(name, value, value in known, f"one of {list(known)}")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many devices stand on each axis; one may be -1: all that are left. A run may resume on another mesh."""

    expert: int = 1  # the groups' layers, their optimizer state and their share of a batch; divides model.num_groups
    data: int = -1  # a batch's rows
    fsdp: int = 1  # rows, and weights and optimizer state besides
    tensor: int = 1  # heads and hidden units

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            check(name, size, size > 0 or size == -1, "positive, or -1 for all devices that are left")
        if list(dataclasses.asdict(self).values()).count(-1) > 1:
            raise ValueError(f"{dataclasses.asdict(self)} leaves two axes open; only one may be -1")


@dataclasses.dataclass(frozen=True)
class Model:
    variant: str = "couple"  # a frozen VLM beside trained replicas of its layers; "blend": shared layers, all trained
    num_groups: int = 4  # K, the timestep-expert groups; divides text.num_layers
    group_sizes: tuple[int, ...] = ()  # layers of each group, first the noisiest; empty: equal
    interval_edges: tuple[float, ...] = ()  # K + 1 flow times from 0 to 1 between which the groups stand; empty: equal
    residual_attention: str = "probabilities"  # what a layer takes up from the one before; or "logits", or "none"
    residual_gate: str = "head"  # one gate for each head, or one for the "layer"
    replica_init: str = "vlm"  # replicas of the VLM's layers start as copies, or at "random"
    # Places of image tokens, beside M-RoPE: a fixed table of sines and cosines, or "none".
    latent_position: str = added("sincos", before="none")
    conditioning: str = added("time", before="time")  # what velocities are conditioned on, see models/conditioning.py
    patch_size: int = 1  # side of the square of latents that makes one image token
    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()


@dataclasses.dataclass(frozen=True)
class Images:
    """What `lattejax.encode` turns into latents; training does not look at it."""

    source: str = "folder"  # image files with captions; "tfds", a data set of tensorflow-datasets; "digits"
    name: str = "pictures"  # the folder; or the data set's name (with ":version", if wanted)
    data_dir: str = ""  # where tensorflow-datasets keeps its data; empty: where it does by itself
    train: str = "train[500:]"  # the split to train on, as tensorflow-datasets writes it; a folder is all "train"
    test: str = "train[:500]"  # the split that is held out
    image_key: str = ""  # which of a data set's features is the picture
    caption_key: str = ""  # and which is to be its prompt: texts, or class labels
    flip: bool = False  # store each picture a second time, mirrored
    batch_size: int = 256  # pictures encoded at a time by each process
    shard_pictures: int = 10_000  # pictures in a file, and between two places to resume from
    most_unreadable: int = 100  # pictures that may be left out because they cannot be read
    threads: int = 16  # that read and crop

    def __post_init__(self):
        check_one_of("source", self.source, PICTURES)
        for name in ("batch_size", "shard_pictures", "threads"):
            check(name, getattr(self, name), getattr(self, name) > 0, "positive")
        check("most_unreadable", self.most_unreadable, self.most_unreadable >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class Data:
    source: str = "latents"  # what `lattejax.encode` has made of `images`; "digits", scikit-learn's handwritten digits
    latents: str = "latents"  # the directory of the latents; empty for the digits
    prompts: str = "captions"  # of the drawings; or "pictures" to look at, each with one request
    autoencoder: str = "weights/dc_ae"  # the directory of a converted one; or "pixels": latents are grey pixels
    image_size: int = 256  # side of the images that are drawn, in pixels
    latent_shape: tuple[int, int, int] = (8, 8, 32)  # rows, columns and channels that the autoencoder makes of them
    prompt_length: int = 128  # tokens that image prompts are padded to
    answer_length: int = 512  # tokens that a whole question with its answer is padded to
    min_pixels: int = 56 * 56  # bounds between which the VLM's image processor resizes what it reads
    max_pixels: int = 512 * 512
    threads: int = 1  # reader threads beside the training loop

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
    vocab_size: int = 384  # at most so many entries if it is trained


@dataclasses.dataclass(frozen=True)
class Stage:
    """What both stages of training have in common. The VLM's defaults: it is taken as it comes, in no steps."""

    # A finished run's workdir to take this stage's first weights from (for the first stage also converted weights);
    # empty: fresh weights.
    init_from: str = ""
    steps: int = 0
    batch_size: int = 1
    accumulation: int = 1  # micro-batches that one batch is cut into
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    decay: str = "none"  # of the learning rate to zero at the last step; or "cosine", "linear"
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # the gradient's global norm is cut to this
    ema_decay: float = 0.0  # 0: the average is the weights themselves
    remat: str = "none"  # what layers recompute in the backward pass; or "dots" (all but matrix products), "full"
    unroll: bool = False  # layers unrolled, not scanned: longer compilation, faster steps where layers are small

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
    share_contexts: bool = True  # each distinct caption is read once, not each row (Couple: ahead; Blend: in each step)
    density: str = "uniform"  # of flow times; or "logit_normal", with density_mean and _std; "shifted", with _shift
    density_mean: float = 0.0
    density_std: float = 1.0
    density_shift: float = 1.0
    stratified: bool = True  # equal shares of a batch for all groups; without, t alone decides, at K times the cost
    answer_batch_size: int = 256  # Blend: questions in each step, beside batch_size images; Couple trains on none
    answer_weight: float = 1.0  # Blend: of the answers' loss beside the flow's

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
    # Of the sample grid, where data.prompts are captions.
    prompts: tuple[str, ...] = (
        "a red bicycle leaning against a white wall",
        "a bowl of soup on a wooden table, seen from above",
    )
    images_per_prompt: int = 8
    sample_steps: int = 40
    guidance: float = 5.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # only steps that start in it are guided
    solver: str = "euler"  # or "heun"
    shift: float = 1.0  # of the step times; 1: none, below 1: more steps near the noise
    batch_size: int = 64  # images that one sampling call draws
    # The scores that are taken: {name: settings}, see evaluation/registry.py.
    evaluators: Settings = Settings(held_out_loss={"at": "training"}, samples={"at": "training"})

    def __post_init__(self):
        check("every", self.every, self.every >= 0, "at least 0")
        check("examples", self.examples, self.examples >= 0, "at least 0")
        check("prompts", self.prompts, len(self.prompts) > 0 and all(map(str.strip, self.prompts)), "non-empty texts")
        for name in ("images_per_prompt", "sample_steps", "batch_size"):
            check(name, getattr(self, name), getattr(self, name) > 0, "positive")
        _ = self.sampling  # checks of its own

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.sample_steps, self.guidance, self.guidance_interval, self.solver, self.shift)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    every: int = 2_000  # steps between checkpoints; the last step always makes one, and so does every evaluation
    keep: int = 3  # the latest that stay
    keep_every: int = 20_000  # those of steps that this divides stay besides; 0: none

    def __post_init__(self):
        check("every", self.every, self.every > 0, "positive")
        check("keep", self.keep, self.keep > 0, "positive")
        check("keep_every", self.keep_every, self.keep_every >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class Profile:
    start: int = 100  # the generation stage's step at which the profiler starts
    steps: int = 0  # how many steps it records; 0: none
