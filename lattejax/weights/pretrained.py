"""A VLM's directory, which `lattejax.convert` makes from a Hugging Face checkpoint: reading it, and exporting it back.

params/               the weights (Orbax), layers stacked, each in its dtype in the checkpoint
config.json, …        geometry, tokenizer, chat template and image processor: the checkpoint's own files, unchanged
conversion.json       the source, and the hash of every weight file; written last

Weights are converted one array at a time, so that memory holds a few arrays, not the model.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath, epy
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint.experimental import v1 as ocp
from PIL import Image
from tqdm import tqdm

from lattejax.data import tokenizer as tokenizers
from lattejax.data.prompts import PromptEncoder
from lattejax.errors import UserError, parsing
from lattejax.files import check_files, local_files, new_directory, read_json, resolve_path
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import VLMConfig
from lattejax.parallel import rules
from lattejax.parallel.mesh import one_device
from lattejax.ranges import Range
from lattejax.weights import hugging_face, layouts, naming, shards
from lattejax.weights.hugging_face import Checkpoint

with epy.lazy_imports():
    import transformers

RECORD = "conversion.json"
GENERATION = "generation_config.json"
CHUNK_BYTES = 16 << 20  # of an array on disk: a device reads the chunks that overlap its shard


def convert(source: str, out: epath.PathLike) -> None:
    """Converts a checkpoint, from a hub id or a local directory, into the directory `out`.

    Raises:
      UserError: the checkpoint is incomplete or not a Qwen2-VL, or `out` exists; nothing is left at `out`.
    """
    hugging_face.read_geometry(hugging_face.find(source, weights=False))  # raises before gigabytes are downloaded
    with new_directory(out) as directory:
        checkpoint = Checkpoint.open(hugging_face.find(source))
        # These raise before hours of work, not after.
        read_encoder(checkpoint.directory, checkpoint.config, Generation.read(checkpoint.directory))
        with _orbax():
            for leaf in tqdm(naming.leaves(checkpoint.config), desc="converting", unit="array", disable=None):
                array = checkpoint.read(leaf)
                ocp.partial.save(directory / "params", traverse_util.unflatten_dict({leaf.path: array}, sep="/"))
            ocp.partial.finalize(directory / "params")
        hugging_face.copy_files(checkpoint.side_files(), directory)
        record = {"source": source, "directory": str(checkpoint.directory), "sha256": checkpoint.shards.hashes()}
        (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _orbax() -> ocp.Context:
    """Settings: arrays are written in chunks, and each array can be read without the others."""
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.pytree.loading.partial_load = True
    return context


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A converted VLM opened for reading."""

    directory: epath.Path
    vlm_config: VLMConfig
    record: dict[str, Any]

    @classmethod
    def open(cls, path: epath.PathLike) -> "Pretrained":
        """Raises `UserError` if there is no complete conversion."""
        directory = resolve_path(path)
        if not is_converted(directory):
            raise UserError(f"{path} holds no converted weights: it has no {RECORD}; make it with lattejax.convert")
        record = read_json(directory / RECORD)
        if not isinstance(record.get("sha256"), dict):
            raise UserError(f"{directory / RECORD} was not written by lattejax.convert: {record!r:.200}")
        return cls(directory, hugging_face.read_geometry(directory), record)

    @functools.cached_property
    def encoder(self) -> PromptEncoder:
        return read_encoder(self.directory, self.vlm_config, self.generation)

    @property
    def generation_file(self) -> epath.Path:
        return self.directory / GENERATION

    @functools.cached_property
    def generation(self) -> "Generation":
        return Generation.read(self.directory)

    def params(self, dtype: str = "bfloat16", mesh: Mesh | None = None) -> Params:
        """Reads the weights, stacked, directly to their devices.

        Args:
          dtype: the dtype of the result.
          mesh: they are sharded over it by `parallel.rules`, and each device reads its shard; None: the first device.

        Raises:
          UserError: the mesh does not fit, or the files are damaged.
        """
        check_files(self.directory / "params", deep=True)
        shapes = naming.abstract_vlm(self.vlm_config)
        try:
            placed = rules.shardings(one_device() if mesh is None else mesh, shapes)
        except ValueError as error:
            raise UserError(str(error)) from error
        placed = traverse_util.flatten_dict(placed, sep="/")
        arrays = {
            path: self._read(path, jax.ShapeDtypeStruct(array.shape, jnp.dtype(dtype), sharding=placed[path]))
            for path, array in traverse_util.flatten_dict(shapes, sep="/").items()
        }
        return traverse_util.unflatten_dict(arrays, sep="/")

    def write_hugging_face(self, out: epath.PathLike) -> None:
        """Writes a checkpoint for transformers, under the hub's names, with every weight bit for bit as converted.

        Raises:
          UserError: `out` exists or is remote, or the weights are damaged.
        """
        shards.check_local(resolve_path(out))
        check_files(self.directory / "params", deep=True)
        here = SingleDeviceSharding(jax.devices("cpu")[0])
        shapes = traverse_util.flatten_dict(naming.abstract_vlm(self.vlm_config), sep="/")
        stored = {
            leaf: jax.ShapeDtypeStruct(shapes[leaf.path].shape, self.dtype(leaf.path), sharding=here)
            for leaf in naming.leaves(self.vlm_config)
        }
        files = shards.split({leaf: array.size * array.dtype.itemsize for leaf, array in stored.items()})

        def tensors() -> Iterator[dict[str, np.ndarray]]:
            for leaves in tqdm(files, desc="writing", unit="file", disable=None):
                unpacked = [leaf.unpack(np.asarray(self._read(leaf.path, stored[leaf]))) for leaf in leaves]
                yield dict(itertools.chain.from_iterable(tensors.items() for tensors in unpacked))

        with new_directory(out) as directory:
            shards.write(directory, tensors(), len(files))
            others = [path for path in self.directory.iterdir() if path.is_file() and path.name != RECORD]
            hugging_face.copy_files(others, directory)

    def _read(self, path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        """Reads one array, with the dtype and sharding of `target`."""
        target = traverse_util.unflatten_dict({path: target}, sep="/")
        shapes = {name: array.shape for name, array in self._stored.items()}
        with parsing(f"{path} in {self.directory}"), _orbax():  # Orbax raises a bare Exception for truncated files
            read = ocp.load(self.directory / "params", layouts.as_stored(target, shapes))
        return traverse_util.flatten_dict(layouts.as_wanted(read, target), sep="/")[path]

    def dtype(self, path: str) -> np.dtype:
        """The dtype that an array has in the files; raises `UserError` if they are damaged."""
        if path not in self._stored:
            raise UserError(f"the weights in {self.directory} are damaged: they lack {path}")
        return self._stored[path].dtype

    @functools.cached_property
    def _stored(self) -> dict[str, Any]:
        """Shape and dtype of each array in the files, by path."""
        with parsing(f"the weights in {self.directory}"):
            stored = ocp.metadata(self.directory / "params").metadata
            return {layouts.keystr(path): array for path, array in jax.tree.leaves_with_path(stored)}


def is_converted(directory: epath.Path) -> bool:
    """Whether a directory holds a finished conversion."""
    return (directory / RECORD).is_file()


def read_encoder(directory: epath.Path, config: VLMConfig, generation: "Generation") -> PromptEncoder:
    """Returns the prompt encoder that a checkpoint's files describe.

    Raises:
      UserError: tokenizer, chat template or image processor are missing, or do not fit the model.
    """
    tokenizer = tokenizers.load(directory)
    if len(tokenizer) > config.text.vocab_size:
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} entries, the model {config.text.vocab_size}")
    check_files(directory)
    with parsing(f"the image processor in {directory}"), local_files(directory) as local:
        processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(local)
        processor(images=[Image.new("RGB", (200, 100))], return_tensors="np")  # its settings have the right types
    encoder, vision = PromptEncoder(tokenizer, processor, stop_tokens=generation.stop_tokens), config.vision
    for what, theirs, ours in (
        ("the image processor's patch_size", processor.patch_size, vision.patch_size),
        ("the image processor's temporal_patch_size", processor.temporal_patch_size, vision.temporal_patch_size),
        ("the image processor's merge_size", processor.merge_size, vision.spatial_merge_size),
        ("the tokenizer's image token", encoder.image_token, hugging_face.image_token(directory)),
    ):
        if theirs != ours:
            raise UserError(f"{directory}: {what} is {theirs}, the model's {ours}")
    return encoder


# Other settings of greedy decoding in transformers, and the values with which they have no effect.
UNSUPPORTED = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "min_length": 0,
    "min_new_tokens": None,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
}


PENALTIES = Range(0, 1000, above=True)


@dataclasses.dataclass(frozen=True)
class Generation:
    """A checkpoint's decoding settings, from its generation_config.json, if it has one."""

    stop_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0

    @classmethod
    def read(cls, directory: epath.Path) -> "Generation":
        """Warns of unsupported settings; raises `UserError` for an invalid penalty."""
        file = directory / GENERATION
        values = read_json(file) if file.exists() else {}
        ends, penalty = values.get("eos_token_id"), values.get("repetition_penalty")
        penalty = 1.0 if penalty is None else penalty
        if type(penalty) not in (int, float) or penalty not in PENALTIES:
            raise UserError(f"{file}: repetition_penalty={penalty!r} must be a number {PENALTIES}")
        others = {name: values[name] for name, off in UNSUPPORTED.items() if values.get(name) not in (None, off)}
        if others:
            logging.warning("%s sets %s, which is not supported and ignored", file, others)
        stop_tokens = tuple(ends) if isinstance(ends, list) else (ends,) * (ends is not None)
        if not all(type(token) is int and token >= 0 for token in stop_tokens):
            raise UserError(f"{file}: eos_token_id={ends!r:.100} must be a token, or a list of tokens")
        return cls(stop_tokens, float(penalty))
