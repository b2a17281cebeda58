"""The sections of a config: for every key its default, its meaning, and the check on its value.

Defaults are the paper's setting: a frozen Qwen2-VL-2B, and 4 groups of 7 layers that draw 256-pixel images with DC-AE.
What the paper does not state (learning rate, betas, clipping, average, density) is our choice.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from lattejax.flow.densities import UNIFORM, Density, LogitNormal, Shifted
from lattejax.flow.schedule import Guidance, NumSteps, Sampling, Shift
from lattejax.models.autoencoders import PIXELS, Autoencoder
from lattejax.models.layers import REMAT_POLICIES
from lattejax.models.pixels import COLOURS, PixelConfig
from lattejax.models.text import MOST_POSITIONS, TextConfig
from lattejax.models.vision import VisionConfig
from lattejax.ranges import Natural, Positive, Range, Share, Size, check_pattern, check_ranges

DECAYS = ("none", "cosine", "linear")
PROMPTS = ("captions", "pictures")
ANSWER_WEIGHTS = ("tokens", "answers")
# The density of flow times of each name, for a stage's settings.
DENSITIES: dict[str, Callable[["GenerationStage"], Density]] = {
    "uniform": lambda stage: UNIFORM,
    "logit_normal": lambda stage: LogitNormal(stage.density_mean, stage.density_std),
    "shifted": lambda stage: Shifted(stage.density_shift),
}
CLIPPED_BY = ("model", "group")
BEFORE = "before"  # in the metadata of a key
Axis = Annotated[int, Range(-1)]
Threads = Annotated[int, Range(1, 1024)]
Side = Annotated[int, Range(1, 2**15)]  # of an image or a grid, in pixels or latents
Tokens = Annotated[int, Range(1, MOST_POSITIONS)]
Decay = Annotated[float, Range(0, 1, below=True)]  # of an average, per step
Factor = Annotated[float, Range(0, 1e6, above=True)]


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

    expert: Axis = 1  # the groups' layers, their optimizer state and their share of a batch; divides model.num_groups
    data: Axis = -1  # a batch's rows
    fsdp: Axis = 1  # rows, and also weights and optimizer state
    tensor: Axis = 1  # heads and hidden units

    def __post_init__(self):
        check_ranges(self)
        for name, size in dataclasses.asdict(self).items():
            check(name, size, size != 0, "positive, or -1 for all remaining devices")
        if len(rest := [name for name, size in dataclasses.asdict(self).items() if size == -1]) > 1:
            raise ValueError(f"{rest[0]}=-1, but {' and '.join(rest[1:])} too; only one axis may be -1")


@dataclasses.dataclass(frozen=True)
class Model:
    variant: str = "couple"  # a frozen VLM beside trained replicas of its layers; "blend": shared layers, all trained
    num_groups: Size = 4  # K, the timestep-expert groups; divides text.num_layers
    group_sizes: tuple[Size, ...] = ()  # layers of each group, the noisiest first; empty: equal
    interval_edges: tuple[Share, ...] = ()  # the K + 1 edges of the groups' flow times, from 0 to 1; empty: equal
    residual_attention: str = "probabilities"  # what a layer adds from the previous layer's map; or "logits", or "none"
    residual_gate: str = "head"  # one gate for each head, or one for the "layer"
    replica_init: str = "vlm"  # replicas of the VLM's layers start as copies, or at "random"
    # Position embedding of image tokens, besides M-RoPE: a fixed sine-cosine table, or "none".
    latent_position: str = added("sincos", before="none")
    conditioning: str = added("time", before="time")  # what velocities are conditioned on, see models/conditioning.py
    prediction: str = added("velocity", before="velocity")  # what the network gives; or "x", the clean latents
    # Whether groups have embedding, time embedding and head in common. Without it no group has weights of another.
    shared_ends: bool = added(True, before=True)
    patch_size: Side = 1  # side of the square of latents in one image token
    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()

    def __post_init__(self):
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class Images:
    """The pictures that `lattejax.encode` turns into latents; training ignores this section."""

    # Image files with texts; or "llava", "tfds", "hugging_face", "webdataset", "digits": see encoding/sources.
    source: str = "folder"
    name: str = "pictures"  # the folder, the JSON file, the tar files' pattern, or the data set's name
    data_dir: str = ""  # where data sets are kept (empty: their library's default); for LLaVA the images' folder
    train: str = "train[500:]"  # the training split, in tensorflow-datasets' notation; files have only "train"
    test: str = "train[:500]"  # the held-out split
    # Features of a data set by their paths, such as "captions/text". A record with captions is drawn.
    image_key: str = ""  # the picture, or several for questions
    caption_key: str = ""  # its prompts: texts or class labels
    prompt_image_key: str = added("", before="")  # pictures that the prompts show
    question_key: str = added("", before="")
    answer_key: str = added("", before="")
    conversations_key: str = added("", before="")  # a conversation, or several
    flip: bool = False  # store each picture a second time, mirrored
    batch_size: Size = 256  # pictures encoded at a time by each process
    shard_pictures: Positive = 10_000  # pictures per file; encoding resumes at the start of a file
    most_unreadable: Natural = 100  # bad records that may be left out: unreadable pictures, empty texts, …
    threads: Threads = 16  # threads that read and crop

    def __post_init__(self):
        check_ranges(self)

    @property
    def keys(self) -> dict[str, str]:
        """The features that are named."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__ if name.endswith("_key")}
        return {name: key for name, key in named.items() if key}


@dataclasses.dataclass(frozen=True)
class Data:
    source: str = "latents"  # the output of `lattejax.encode`; "digits", scikit-learn's handwritten digits
    latents: str = "latents"  # the directory of the latents; empty for the digits
    prompts: str = "captions"  # of the drawings; or "pictures": each prompt is a picture with one request
    autoencoder: str = "weights/dc_ae"  # the directory of a converted autoencoder; or "pixels": no autoencoder
    image_size: Side = 256  # side of the drawn images, in pixels
    latent_shape: tuple[Side, Side, Side] = (8, 8, 32)  # rows, columns and channels; of pixels 1 channel (grey) or 3
    prompt_length: Tokens = 128  # tokens that image prompts are padded to
    answer_length: Tokens = 512  # tokens that a question with its answer is padded to
    # A regular expression: drawings whose captions match are not trained on, to see whether they are drawn even so.
    unseen: str = added("", before="")
    # What the loss of answers is a mean over: their "tokens"; or "answers", so that a long one counts as much as a yes.
    answer_weights: str = added("tokens", before="tokens")
    min_pixels: Positive = 56 * 56  # bounds on the area to which the VLM's image processor resizes its inputs
    max_pixels: Positive = 512 * 512
    threads: Threads = 1  # reader threads besides the training loop

    def __post_init__(self):
        check_ranges(self)
        check_pattern("unseen", self.unseen)
        check_one_of("prompts", self.prompts, PROMPTS)
        check_one_of("answer_weights", self.answer_weights, ANSWER_WEIGHTS)
        check(
            "max_pixels", self.max_pixels, self.max_pixels >= self.min_pixels, f"at least min_pixels={self.min_pixels}"
        )
        if self.autoencoder == PIXELS:
            shapes = [Autoencoder(PixelConfig(channels)).latent_shape(self.image_size) for channels in COLOURS]
            expected = f"{' or '.join(map(str, shapes))} for bare pixels"
            check("latent_shape", self.latent_shape, self.latent_shape in shapes, expected)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    path: str = ""  # a directory with a Hugging Face tokenizer; empty: train one on the captions and questions
    vocab_size: Annotated[int, Range(270, 2**20)] = 384  # maximum number of entries if it is trained

    def __post_init__(self):
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class Stage:
    """The keys that both stages of training share. The defaults are the VLM's: taken unchanged, with no steps."""

    # Where initial weights come from: a run's workdir (its finished VLM, its pathway's latest checkpoint), an export,
    # or, in the first stage, converted weights. Empty: random weights.
    init_from: str = ""
    steps: Natural = 0
    batch_size: Size = 1
    accumulation: Size = 1  # micro-batches that one batch is split into
    learning_rate: Annotated[float, Range(0, 100)] = 1e-5
    warmup_steps: Natural = 0
    decay: str = "none"  # of the learning rate, to zero one step after the last; or "cosine", "linear"
    adam_b1: Decay = 0.9
    adam_b2: Decay = 0.95
    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    clip_norm: Annotated[float, Range(0, 1e30, above=True)] = 1.0  # the gradient's norm is clipped to this
    ema_decay: Decay = 0.0  # 0: the average is the weights themselves
    remat: str = "none"  # what layers recompute in the backward pass; or "dots" (all but matrix products), "full"
    unroll: bool = False  # layers unrolled, not scanned: longer compilation, faster steps if layers are small

    def __post_init__(self):
        check_ranges(self)
        check_one_of("decay", self.decay, DECAYS)
        check_one_of("remat", self.remat, REMAT_POLICIES)
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of accumulation={self.accumulation}")


@dataclasses.dataclass(frozen=True)
class GenerationStage(Stage):
    steps: Natural = 240_000
    batch_size: Size = 2048
    learning_rate: Annotated[float, Range(0, 100)] = 2e-4
    warmup_steps: Natural = 5_000
    ema_decay: Decay = 0.9999
    remat: str = "dots"
    prompt_dropout: Share = 0.1  # probability of training on the empty prompt, which guidance needs
    share_contexts: bool = (
        True  # one context per distinct caption, not per row (Couple: in advance; Blend: in each step)
    )
    density: str = "uniform"  # of flow times; or "logit_normal", with density_mean and _std; "shifted", with _shift
    density_mean: Annotated[float, Range(-100, 100)] = 0.0
    density_std: Factor = 1.0
    density_shift: Factor = 1.0
    # A group also trains on flow times beyond both ends of its interval, up to this share of the interval's length.
    interval_overlap: Share = added(0.0, before=0.0)
    clip_by: str = added("model", before="model")  # whose gradient's norm is clipped; or "group": each group's own
    stratified: bool = True  # equal shares of a batch for all groups; otherwise t decides, at K times the cost
    answer_batch_size: Size = 256  # Blend: questions in each step, besides batch_size images; Couple trains on none
    answer_weight: Factor = 1.0  # Blend: weight of the answers' loss; the flow's is 1

    def __post_init__(self):
        super().__post_init__()
        check_one_of("density", self.density, DENSITIES)
        check_one_of("clip_by", self.clip_by, CLIPPED_BY)
        if self.interval_overlap and not self.stratified:
            raise ValueError("interval_overlap needs stratified=True: otherwise each flow time has one owner")

    @property
    def flow_density(self) -> Density:
        return DENSITIES[self.density](self)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    every: Natural = 10_000  # steps between evaluations; 0: only at the end of a stage
    examples: Natural = 512  # held-out examples for the flow loss and the answers; 0: all of them
    # For the sample grid, if data.prompts="captions".
    prompts: tuple[str, ...] = (
        "a red bicycle leaning against a white wall",
        "a bowl of soup on a wooden table, seen from above",
    )
    images_per_prompt: Size = 8
    sample_steps: NumSteps = 40
    guidance: Guidance = 5.0
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)  # only steps that start in it are guided
    solver: str = "euler"  # or "heun"
    shift: Shift = 1.0  # of the step times; 1: no shift, below 1: more steps near the noise
    batch_size: Size = 64  # images per sampling call
    # The scores to take: {name: settings}, see evaluation/registry.py.
    evaluators: Settings = Settings(held_out_loss={"at": "training"}, samples={"at": "training"})

    def __post_init__(self):
        check_ranges(self)
        check("prompts", self.prompts, len(self.prompts) > 0 and all(map(str.strip, self.prompts)), "non-empty texts")
        _ = self.sampling  # runs its own checks

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.sample_steps, self.guidance, self.guidance_interval, self.solver, self.shift)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    every: Positive = 2_000  # steps between checkpoints; the last step and every evaluation also make one
    keep: Positive = 3  # the number of latest checkpoints to keep
    keep_every: Natural = 20_000  # checkpoints at multiples of this step are kept too; 0: none
    # The second stage's checkpoint with the best figure of any evaluator is kept too: "lowest held_out_loss", "highest
    # answer_accuracy"; empty: none.
    best: str = added("", before="")

    def __post_init__(self):
        check_ranges(self)
        good = not self.best or re.fullmatch(r"(lowest|highest) \w+", self.best) is not None
        check("best", self.best, good, "empty, or lowest or highest and the name of a figure")


@dataclasses.dataclass(frozen=True)
class Profile:
    start: Positive = 100  # the generation stage's step at which the profiler starts
    steps: Natural = 0  # how many steps it records; 0: none

    def __post_init__(self):
        check_ranges(self)
