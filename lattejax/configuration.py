"""Every config key, in one place: what it means, its type, and the checks on its value.

A config file under configs/ builds a plain `ml_collections.ConfigDict` with exactly these keys; `resolve` turns it into
the frozen dataclasses that the rest of the code reads. An unknown or missing key, or a value of the wrong type, is an
error before any work starts.
"""

import dataclasses
import difflib
import functools
import json
import types
import typing
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lattejax.errors import UserError
from lattejax.files import read_json, write_whole
from lattejax.flow.densities import Density, LogitNormal, Shifted, Uniform
from lattejax.flow.schedule import Sampling
from lattejax.models.autoencoders import PIXELS, Autoencoder
from lattejax.models.functional import REMAT_POLICIES
from lattejax.models.generation_config import GenerationConfig
from lattejax.models.latte_flow import ModelConfig
from lattejax.models.pixels import PixelConfig
from lattejax.models.qwen2_vl import VLMConfig
from lattejax.models.text import TextConfig
from lattejax.models.vision import VisionConfig

DTYPES = ("float32", "bfloat16")
LEAST_MASS = 1e-5  # of the density of flow time, in a group's interval
DECAYS = ("none", "cosine", "linear")
SOURCES = ("digits", "latents")
PICTURES = ("tfds", "folder", "digits")
PROMPTS = ("captions", "pictures")
DENSITIES = ("uniform", "logit_normal", "shifted")


def _check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r} must be {expected}")


def _check_one_of(name: str, value: str, known: typing.Iterable[str]) -> None:
    _check(name, value, value in known, f"one of {list(known)}")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many devices stand on each axis; one may be -1: all that are left. A run may go on with another mesh."""

    expert: int  # the groups' layers, their optimizer state and their share of a batch; divides model.num_groups
    data: int  # a batch's rows
    fsdp: int  # rows, and weights and optimizer state besides
    tensor: int  # heads and hidden units

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            _check(name, size, size > 0 or size == -1, "positive, or -1 for all devices that are left")
        if list(dataclasses.asdict(self).values()).count(-1) > 1:
            raise ValueError(f"{dataclasses.asdict(self)} leaves two axes open; only one may be -1")


@dataclasses.dataclass(frozen=True)
class Model:
    variant: str  # "couple": a frozen VLM beside trained replicas of its layers; "blend": shared layers, all trained
    num_groups: int  # K, the timestep-expert groups; divides text.num_layers
    group_sizes: tuple[int, ...]  # layers of each group, first the noisiest; empty: equal
    interval_edges: tuple[float, ...]  # K + 1 flow times from 0 to 1 between which the groups stand; empty: equal
    residual_attention: str  # what a layer takes up from the one before: "probabilities", "logits", or "none"
    residual_gate: str  # one gate for each "head", or one for the "layer"
    replica_init: str  # replicas of the VLM's layers start as copies ("vlm") or at "random"
    latent_position: str  # places of image tokens, beside M-RoPE: a fixed table of sines and cosines ("sincos"); "none"
    patch_size: int  # side of the square of latents that makes one image token
    text: TextConfig
    vision: VisionConfig


@dataclasses.dataclass(frozen=True)
class Images:
    """What `lattejax.encode` turns into latents; training does not look at it."""

    source: str  # "tfds", a data set of tensorflow-datasets; "folder", image files with captions; "digits"
    name: str  # the data set's (with ":version", if wanted); or the folder
    data_dir: str  # where tensorflow-datasets keeps its data; empty: where it does by itself
    train: str  # the split to train on, as tensorflow-datasets writes it: "train", "train[500:]"; folders are "train"
    test: str  # the split that is held out: "validation", "train[:500]"
    image_key: str  # which of a data set's features is the picture
    caption_key: str  # and which is to be its prompt: texts, or class labels
    flip: bool  # store each picture a second time, mirrored
    batch_size: int  # pictures encoded at a time by each process
    shard_pictures: int  # pictures in a file, and between two places to go on from
    most_unreadable: int  # pictures that may be left out because they cannot be read
    threads: int  # that read and crop

    def __post_init__(self):
        _check_one_of("source", self.source, PICTURES)
        for name in ("batch_size", "shard_pictures", "threads"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "positive")
        _check("most_unreadable", self.most_unreadable, self.most_unreadable >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class Data:
    source: str  # "digits", scikit-learn's handwritten digits; "latents", what `lattejax.encode` has made of `images`
    latents: str  # the directory of the latents; empty for the digits
    prompts: str  # of the drawings: "captions", or "pictures" to look at, each with one request
    autoencoder: str  # "pixels", where latents are grey pixels; or the directory of a converted one
    image_size: int  # side of the images that are drawn, in pixels
    latent_shape: tuple[int, int, int]  # rows, columns and channels that the autoencoder makes of them
    prompt_length: int  # tokens that image prompts are padded to
    answer_length: int  # tokens that a whole question with its answer is padded to
    min_pixels: int  # bounds between which the VLM's image processor resizes what it reads
    max_pixels: int
    threads: int  # reader threads beside the training loop

    def __post_init__(self):
        _check_one_of("source", self.source, SOURCES)
        _check_one_of("prompts", self.prompts, PROMPTS)
        _check("image_size", self.image_size, self.image_size > 0, "positive")
        _check("threads", self.threads, self.threads > 0, "positive")
        if self.autoencoder == PIXELS:
            shape = Autoencoder(PixelConfig()).latent_shape(self.image_size)
            _check("latent_shape", self.latent_shape, self.latent_shape == shape, f"{shape} for bare pixels")
        if self.source == "digits":
            _check("autoencoder", self.autoencoder, self.autoencoder == PIXELS, f"{PIXELS!r} for the digits")
            _check("image_size", self.image_size, self.image_size == 8, "8, the digits' own size")
        else:
            _check("latents", self.latents, bool(self.latents), "the directory that lattejax.encode has made")
            _check("prompts", self.prompts, self.prompts == "captions", "'captions' where latents are cached")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    path: str  # a directory with a Hugging Face tokenizer; empty: train one on the captions and questions
    vocab_size: int  # at most so many entries if it is trained


@dataclasses.dataclass(frozen=True)
class Stage:
    """What both stages of training have in common."""

    init_from: str  # a finished run's workdir to take this stage's first weights from (for the first stage also
    # converted weights); empty: fresh weights
    steps: int
    batch_size: int
    accumulation: int  # micro-batches that one batch is cut into
    learning_rate: float
    warmup_steps: int
    decay: str  # of the learning rate to zero at the last step: "none", "cosine", "linear"
    adam_b1: float
    adam_b2: float
    weight_decay: float
    clip_norm: float  # the gradient's global norm is cut to this
    ema_decay: float  # 0: the average is the weights themselves
    remat: str  # what layers recompute in the backward pass: "none", "dots" (all but matrix products), "full"
    unroll: bool  # layers unrolled, not scanned: longer compilation, faster steps where layers are small

    def __post_init__(self):
        _check_one_of("decay", self.decay, DECAYS)
        _check_one_of("remat", self.remat, REMAT_POLICIES)
        _check("steps", self.steps, self.steps >= 0, "at least 0")
        _check("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        _check("batch_size", self.batch_size, self.batch_size > 0, "positive")
        _check("accumulation", self.accumulation, self.accumulation > 0, "positive")
        _check("clip_norm", self.clip_norm, self.clip_norm > 0, "positive")
        _check("ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "in [0, 1)")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of accumulation={self.accumulation}")


@dataclasses.dataclass(frozen=True)
class GenerationStage(Stage):
    prompt_dropout: float  # probability of training on the empty prompt, which guidance needs
    share_contexts: bool  # each distinct caption is read once, not each row (Couple: ahead; Blend: in each step)
    density: str  # of flow times: "uniform"; "logit_normal" with density_mean and _std; "shifted" with density_shift
    density_mean: float
    density_std: float
    density_shift: float
    stratified: bool  # equal shares of a batch for all groups; without, t alone decides, at K times the cost
    answer_batch_size: int  # Blend: questions in each step, beside batch_size images; Couple trains on none
    answer_weight: float  # Blend: of the answers' loss beside the flow's

    def __post_init__(self):
        super().__post_init__()
        _check("prompt_dropout", self.prompt_dropout, 0 <= self.prompt_dropout <= 1, "in [0, 1]")
        _check_one_of("density", self.density, DENSITIES)
        _check("density_std", self.density_std, self.density_std > 0, "positive")
        _check("density_shift", self.density_shift, self.density_shift > 0, "positive")
        _check("answer_batch_size", self.answer_batch_size, self.answer_batch_size > 0, "positive")
        _check("answer_weight", self.answer_weight, self.answer_weight > 0, "positive")

    @property
    def flow_density(self) -> Density:
        return {
            "uniform": Uniform(),
            "logit_normal": LogitNormal(self.density_mean, self.density_std),
            "shifted": Shifted(self.density_shift),
        }[self.density]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    every: int  # steps between evaluations; 0: only at the end of a stage
    examples: int  # held-out examples for the flow loss and the answers; 0: all of them
    prompts: tuple[str, ...]  # of the sample grid, where data.prompts are captions
    images_per_prompt: int
    sample_steps: int
    guidance: float
    guidance_interval: tuple[float, float]  # only steps that start in it are guided
    solver: str  # "euler" or "heun"
    shift: float  # of the step times; 1: none, below 1: more steps near the noise
    batch_size: int  # images that one sampling call draws
    scored_images: int  # digits that each evaluation draws and scores, as many of each; 0: none
    final_images: int  # digits that the final score draws at each guidance scale, as many of each; 0: none

    def __post_init__(self):
        _check("every", self.every, self.every >= 0, "at least 0")
        _check("examples", self.examples, self.examples >= 0, "at least 0")
        _check("prompts", self.prompts, len(self.prompts) > 0 and all(map(str.strip, self.prompts)), "non-empty texts")
        for name in ("scored_images", "final_images"):
            good = getattr(self, name) >= 0 and getattr(self, name) % 10 == 0
            _check(name, getattr(self, name), good, "a multiple of the 10 digits")
        for name in ("images_per_prompt", "sample_steps", "batch_size"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "positive")
        _ = self.sampling  # checks of its own

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.sample_steps, self.guidance, self.guidance_interval, self.solver, self.shift)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    every: int  # steps between checkpoints; the last step always makes one, and so does every evaluation
    keep: int  # the latest that stay
    keep_every: int  # those of steps that this divides stay besides; 0: none

    def __post_init__(self):
        _check("every", self.every, self.every > 0, "positive")
        _check("keep", self.keep, self.keep > 0, "positive")
        _check("keep_every", self.keep_every, self.keep_every >= 0, "at least 0")


@dataclasses.dataclass(frozen=True)
class Profile:
    start: int  # the generation stage's step at which the profiler starts
    steps: int  # how many steps it records; 0: none


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    dtype: str  # of the computation: "float32" or "bfloat16"; master weights are always float32
    log_every: int  # steps between lines of metrics
    most_skipped_steps: int  # of a stage, for loss or gradients that are not finite; one more stops the run
    mesh: Mesh
    model: Model
    images: Images
    data: Data
    tokenizer: Tokenizer
    pretrain: Stage  # the VLM, on questions about images
    train: GenerationStage  # the generation pathway, and in Blend the VLM's layers
    eval: Evaluation
    checkpoint: Checkpoints
    profile: Profile

    def __post_init__(self):
        _check_one_of("dtype", self.dtype, DTYPES)
        _check("log_every", self.log_every, self.log_every > 0, "positive")
        _check("most_skipped_steps", self.most_skipped_steps, self.most_skipped_steps >= 0, "at least 0")
        _ = self.model_config  # checks of its own
        if self.mesh.expert != 1:
            if self.trains_answers or self.model.group_sizes:
                what = "model.variant='blend'" if self.trains_answers else "model.group_sizes"
                raise ValueError(f"mesh.expert={self.mesh.expert} must be 1 with {what}: those layers are not alike")
            if self.model.num_groups % self.mesh.expert:
                raise ValueError(f"mesh.expert={self.mesh.expert} does not divide the {self.model.num_groups} groups")
        groups, accumulation = self.model.num_groups if self.train.stratified else 1, self.train.accumulation
        if self.train.batch_size % (accumulation * groups):
            raise ValueError(
                f"train.batch_size={self.train.batch_size} must be a multiple of train.accumulation ({accumulation}) "
                f"times model.num_groups ({groups}), so that every group gets an equal share"
            )
        if self.trains_answers and self.train.answer_batch_size % accumulation:
            raise ValueError(
                f"train.answer_batch_size={self.train.answer_batch_size} must be a multiple of train.accumulation "
                f"({accumulation})"
            )
        if self.data.prompts == "pictures" and self.train.share_contexts:
            raise ValueError("data.prompts='pictures' makes every prompt its own; set train.share_contexts=False")
        if self.data.source != "digits":
            for what, asked in (
                ("pretrain.steps", self.pretrain.steps),
                ("eval.scored_images", self.eval.scored_images),
                ("eval.final_images", self.eval.final_images),
            ):
                _check(what, asked, asked == 0, "0: only the digits come with questions and with a score of drawings")
            if self.trains_answers:
                raise ValueError("model.variant='blend' trains on questions too, and only the digits come with some")
        if self.train.init_from and (self.pretrain.init_from != self.train.init_from or self.pretrain.steps):
            raise ValueError(
                f"train.init_from={self.train.init_from!r} needs the VLM that its generation pathway was trained "
                "beside; set pretrain.init_from to the same run, and pretrain.steps=0"
            )
        masses = self.model_config.generation.intervals.masses(self.train.flow_density)
        if np.min(masses) < LEAST_MASS:
            raise ValueError(
                f"train.density={self.train.density!r} leaves a group next to nothing to train on: the groups' shares "
                f"of the flow times are {np.round(masses, 6).tolist()}"
            )

    @property
    def trains_answers(self) -> bool:
        """Whether the second stage trains on questions too: where it trains weights that answer them."""
        return self.model_config.shares_layers

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(
            vlm=VLMConfig(self.model.text, self.model.vision),
            generation=GenerationConfig(
                text=self.model.text,
                latent_shape=self.data.latent_shape,
                num_groups=self.model.num_groups,
                group_sizes=self.model.group_sizes,
                interval_edges=self.model.interval_edges,
                residual_attention=self.model.residual_attention,
                residual_gate=self.model.residual_gate,
                replica_init=self.model.replica_init,
                latent_position=self.model.latent_position,
                patch_size=self.model.patch_size,
            ),
            variant=self.model.variant,
        )


# ---- From a ConfigDict or JSON to the dataclasses, and back

# Keys that configs did not have from the start, and the value that says what the code did before.
ADDED_KEYS = {"model.latent_position": "none"}


def check_key(key: str) -> None:
    """Raises `UserError` for a key that no config has, and names those that are spelt most like it."""
    known = known_keys()
    if key not in known:
        close = difflib.get_close_matches(key, known, n=3, cutoff=0.3)
        raise UserError(f"unknown config key {key}; the nearest known are {', '.join(close or known)}")


def _fields(cls: type) -> dict[str, type]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every key of a config, sections as dots."""
    keys = []
    for name, kind in _fields(cls).items():
        nested = known_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
        keys.extend(nested)
    return keys


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path + ".")
    if isinstance(kind, types.GenericAlias):  # tuple[int, int, int] or tuple[str, ...]
        items = typing.get_args(kind)
        if not isinstance(value, (tuple, list)) or (Ellipsis not in items and len(value) != len(items)):
            raise UserError(f"config.{path}={value!r} must be a tuple like {kind}")
        return tuple(_convert(items[0], item, path) for item in value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"config.{path}={value!r} is of type {type(value).__name__}; expected {kind.__name__}")
    return value


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"config.{prefix[:-1]}={values!r} must be a section with keys {', '.join(_fields(cls))}")
    fields = _fields(cls)
    for name in values:
        if name not in fields:
            check_key(prefix + name)
    missing = [prefix + name for name in fields if name not in values]
    if missing:
        before = [f"{key}={ADDED_KEYS[key]!r} is how it was before that key" for key in missing if key in ADDED_KEYS]
        raise UserError("; ".join([f"the config lacks {', '.join(missing)}", *before]))
    arguments = {name: _convert(kind, values[name], prefix + name) for name, kind in fields.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"config.{prefix}{error}" if prefix else f"config: {error}") from error


def resolve(config: ConfigDict | dict[str, Any]) -> Config:
    """Checks a config file's dict and returns it typed; raises `UserError` for what is unknown or misshapen."""
    return _build(Config, config.to_dict() if isinstance(config, ConfigDict) else config, "")


def save(config: Config, path: epath.Path) -> None:
    write_whole(path, (json.dumps(dataclasses.asdict(config), indent=2) + "\n").encode())


def load(path: epath.Path) -> Config:
    """Reads the config of a run or an export; one made before a key was added means what the code did then."""
    values = read_json(path)
    for key, before in ADDED_KEYS.items():
        *sections, name = key.split(".")
        section = functools.reduce(lambda values, part: values.get(part, {}), sections, values)
        if isinstance(section, dict):
            section.setdefault(name, before)
    return resolve(values)


def differences(ours: Config, theirs: Config) -> list[str]:
    """Lists the keys on which two configs differ, as `key: theirs -> ours`."""

    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {path: value}
        return {k: v for name, item in value.items() for k, v in flat(item, f"{path}.{name}".strip(".")).items()}

    old, new = flat(dataclasses.asdict(theirs)), flat(dataclasses.asdict(ours))
    return [f"{key}: {old[key]!r} -> {new[key]!r}" for key in new if old[key] != new[key]]
