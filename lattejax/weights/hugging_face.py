"""Qwen2-VL checkpoints in Hugging Face's format: config.json, sharded safetensors, tokenizer and processor files.

`Checkpoint.open` checks everything that can be checked without reading weights: the architecture, and that names and
shapes of tensors match it exactly. Tensors are then read one at a time, which bounds the memory.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

import huggingface_hub
import numpy as np
from etils import epath, epy
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lattejax.errors import UserError, parsing
from lattejax.files import is_remote, read_json, resolve_path
from lattejax.models.qwen2_vl import VLMConfig
from lattejax.models.text import TextConfig
from lattejax.models.vision import VisionConfig
from lattejax.weights import naming, shards
from lattejax.weights.naming import Leaf
from lattejax.weights.shards import Shards

with epy.lazy_imports():
    import transformers

CONFIG = "config.json"
HUB = "hf://"  # before the name of a repository
# The files copied along with the weights: geometry, tokenizer, chat template, image processor, licence.
SIDE_FILES = ("*.json", "*.txt", "*.jinja", "LICENSE*")


# ---- Geometry


def read_geometry(directory: epath.Path) -> VLMConfig:
    """Returns the geometry that a checkpoint's config.json describes.

    Raises:
      UserError: it is missing, is not a Qwen2-VL, or asks for something that this implementation does not support.
    """
    path = directory / CONFIG
    if not path.exists():
        raise UserError(f"{directory} is not a checkpoint: it has no {CONFIG}")
    values = read_json(path)
    if values.get("model_type") != "qwen2_vl":
        raise UserError(f"{directory} holds a model of type {values.get('model_type')!r}; only 'qwen2_vl' can be read")
    if "quantization_config" in values:
        raise UserError(f"{directory} holds quantized weights; use the checkpoint that they were made from")
    with parsing(f"the Qwen2-VL config {path}"):
        return _geometry(transformers.Qwen2VLConfig.from_dict(values))


def _geometry(config: "transformers.Qwen2VLConfig") -> VLMConfig:
    text, vision, rope = config.text_config, config.vision_config, config.text_config.rope_parameters
    for name, value, supported in (
        ("hidden_act", text.hidden_act, "silu"),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("layer_types", ", ".join(sorted(set(text.layer_types))), "full_attention"),
        ("vision_config.hidden_act", vision.hidden_act, "quick_gelu"),
    ):
        if value != supported:
            raise ValueError(f"{name}={value!r} is not supported; only {supported!r} is")
    if "mrope_section" not in rope:
        raise ValueError("mrope_section is missing")
    return VLMConfig(
        TextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            rope_theta=float(rope["rope_theta"]),
            mrope_section=tuple(rope["mrope_section"]),
            rms_norm_eps=text.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
        ),
        VisionConfig(
            depth=vision.depth,
            embed_dim=vision.embed_dim,
            num_heads=vision.num_heads,
            mlp_ratio=vision.mlp_ratio,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            in_channels=vision.in_channels,
            hidden_size=vision.hidden_size,
        ),
    )


def image_token(directory: epath.Path) -> int:
    """The placeholder token of an image's patches, from config.json."""
    return transformers.Qwen2VLConfig.from_dict(read_json(directory / CONFIG)).image_token_id


# ---- Reading


def find(source: str, *, weights: bool = True) -> epath.Path:
    """Returns a local directory unchanged; anything else is a hub id, whose files are downloaded unless cached, those
    of weights if they are wanted."""
    directory = resolve_path(source)
    if is_remote(directory):
        raise UserError(f"--source={source} is remote; safetensors are read from a local disk: copy them there first")
    return directory if directory.is_dir() else _download(source, None, f"--source={source}", weights=weights)


def on_disk(path: epath.PathLike) -> epath.PathLike:
    """Returns where the files of hf://owner/name or hf://owner/name@revision are, which are downloaded unless cached;
    any other path unchanged."""
    text = os.fspath(path)
    if not text.startswith(HUB):
        return path
    name, _, revision = text.removeprefix(HUB).partition("@")
    return _download(name, revision or None, text)


def name_of(path: epath.PathLike) -> str:
    """The name in hf://owner/name@revision; empty for any other path."""
    text = os.fspath(path)
    return text.removeprefix(HUB).partition("@")[0].rpartition("/")[2] if text.startswith(HUB) else ""


def _download(name: str, revision: str | None, asked: str, *, weights: bool = True) -> epath.Path:
    try:
        patterns = ["*.safetensors"] * weights + [*SIDE_FILES]
        return epath.Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(f"{asked} is neither a directory nor a hub id") from error
    except (HfHubHTTPError, OSError) as error:  # no such repository, no network, nothing cached
        raise UserError(
            f"{asked} is no directory, and cannot be downloaded from the hub: {type(error).__name__}: {error}"
        ) from error


def hub_id(record: dict[str, Any]) -> str:
    """The hub id that weights were converted from, by the record of the conversion; empty if it was a directory."""
    source, directory = record.get("source"), record.get("directory")
    if not isinstance(source, str) or not isinstance(directory, str):
        return ""
    return source if f"models--{source.replace('/', '--')}" in epath.Path(directory).parts else ""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names and shapes have been checked."""

    directory: epath.Path
    config: VLMConfig
    shards: Shards
    stored_names: dict[str, str]  # of each tensor, by the hub's original name

    @classmethod
    def open(cls, directory: epath.Path) -> "Checkpoint":
        """Raises `UserError` if a tensor is missing, unexpected or of the wrong shape, or a file is truncated."""
        config, opened, stored_names = read_geometry(directory), Shards.open(directory), {}
        for stored in opened.files:
            name = naming.original_name(stored)
            if name in stored_names:
                raise UserError(f"{directory}: {stored_names[name]} and {stored} are the same weight")
            stored_names[name] = stored
        checkpoint = cls(directory, config, opened, stored_names)
        checkpoint._drop_copied_head()
        checkpoint._check()
        return checkpoint

    def _drop_copied_head(self) -> None:
        """With tied embeddings some tools store the head too; a copy of the embedding is dropped."""
        if self.config.text.tie_word_embeddings and {naming.HEAD, naming.EMBEDDING} <= self.stored_names.keys():
            head, embedding = (self.shards.read(self.stored_names[name]) for name in (naming.HEAD, naming.EMBEDDING))
            if head.dtype != embedding.dtype or not np.array_equal(head.view(np.uint8), embedding.view(np.uint8)):
                raise UserError(
                    f"{self.directory}: {CONFIG} ties the embeddings, but {naming.HEAD} is not {naming.EMBEDDING}; "
                    "set tie_word_embeddings to false if it should be used"
                )
            del self.stored_names[naming.HEAD]

    def _check(self) -> None:
        have = {name: self.shards.shapes[stored] for name, stored in self.stored_names.items()}
        want = {name: leaf.tensor_shape for leaf in naming.leaves(self.config) for name in leaf.names}
        shards.check_tensors(have, want, self.directory / CONFIG)

    def read(self, leaf: Leaf) -> np.ndarray:
        """Reads one of our arrays, in its stored dtype."""
        return leaf.pack(self._tensors(leaf))

    def _tensors(self, leaf: Leaf) -> Iterator[np.ndarray]:
        dtype = None
        for name in leaf.names:
            tensor = self.shards.read(self.stored_names[name])
            if dtype not in (None, tensor.dtype):
                raise UserError(f"{self.directory}: {name} is {tensor.dtype}, other layers' are {dtype}")
            dtype = tensor.dtype
            yield tensor

    def side_files(self) -> list[epath.Path]:
        """The files beside the weights."""
        found = {path for pattern in SIDE_FILES for path in self.directory.glob(pattern) if path.is_file()}
        return sorted(path for path in found if path.name != shards.INDEX)


def copy_files(files: Iterable[epath.Path], directory: epath.Path) -> None:
    for file in files:
        (directory / file.name).write_bytes(file.read_bytes())
