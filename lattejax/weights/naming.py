"""Names and shapes of Qwen2-VL's weights in a Hugging Face checkpoint, mapped to our paths.

There are two naming schemes: the hub's original names, which this table uses, and the names that transformers 5 uses in
memory and can also write; `original_name` converts the second to the first. Shapes differ in three ways: the patch
embedding is a convolution there and a linear map here, heads have a separate axis here (`weights.layouts`), and our
layers are stacked on a leading axis.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from flax import traverse_util

from lattejax.models import qwen2_vl
from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import VLMConfig
from lattejax.weights import layouts

# Our module, and theirs; the braces stand for the layer's index.
MODULES = {
    "text/vocabulary": "model.embed_tokens",
    "text/vocabulary/final_norm": "model.norm",
    "text/vocabulary/lm_head": "lm_head",
    "text/layers/input_norm": "model.layers.{}.input_layernorm",
    "text/layers/attention/q_proj": "model.layers.{}.self_attn.q_proj",
    "text/layers/attention/k_proj": "model.layers.{}.self_attn.k_proj",
    "text/layers/attention/v_proj": "model.layers.{}.self_attn.v_proj",
    "text/layers/attention/o_proj": "model.layers.{}.self_attn.o_proj",
    "text/layers/post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "text/layers/mlp/gate_proj": "model.layers.{}.mlp.gate_proj",
    "text/layers/mlp/up_proj": "model.layers.{}.mlp.up_proj",
    "text/layers/mlp/down_proj": "model.layers.{}.mlp.down_proj",
    "vision/patch_embedding/proj": "visual.patch_embed.proj",
    "vision/blocks/norm1": "visual.blocks.{}.norm1",
    "vision/blocks/attention/qkv": "visual.blocks.{}.attn.qkv",
    "vision/blocks/attention/proj": "visual.blocks.{}.attn.proj",
    "vision/blocks/norm2": "visual.blocks.{}.norm2",
    "vision/blocks/fc1": "visual.blocks.{}.mlp.fc1",
    "vision/blocks/fc2": "visual.blocks.{}.mlp.fc2",
    "vision/merger/norm": "visual.merger.ln_q",
    "vision/merger/fc1": "visual.merger.mlp.0",
    "vision/merger/fc2": "visual.merger.mlp.2",
}
LEAVES = {"embedding": "weight", "weight": "weight", "scale": "weight", "bias": "bias"}

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one tensor if embeddings are tied


def original_name(name: str) -> str:
    """The hub's name of a tensor that transformers 5 may have written under another name."""
    for new, old in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our arrays, and the checkpoint's tensors that make it up: one, or one per layer."""

    path: str
    shape: tuple[int, ...]  # of our array
    names: tuple[str, ...]
    tensor_shape: tuple[int, ...]  # of each tensor in the checkpoint
    stacked: bool

    def pack(self, tensors: Iterator[np.ndarray]) -> np.ndarray:
        """Packs the checkpoint's tensors into our array, one at a time."""
        if not self.stacked:
            return np.ascontiguousarray(next(tensors)).reshape(self.shape)
        packed = None
        for i, tensor in enumerate(tensors):
            packed = np.empty(self.shape, tensor.dtype) if packed is None else packed
            packed[i] = tensor.reshape(self.shape[1:])
        return packed

    def unpack(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The inverse of `pack`: the checkpoint's tensors by name."""
        tensors = array if self.stacked else array[None]
        return {name: tensor.reshape(self.tensor_shape) for name, tensor in zip(self.names, tensors, strict=True)}


def abstract_vlm(config: VLMConfig) -> Params:
    """The shapes of all weights of a VLM, stacked, float32."""
    return jax.eval_shape(lambda: qwen2_vl.init(config, jax.random.key(0)))


def leaves(config: VLMConfig) -> list[Leaf]:
    """All arrays of a VLM of this geometry, with the checkpoint's tensors for each."""
    vision = config.vision
    convolution = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    found = []
    for path, array in traverse_util.flatten_dict(abstract_vlm(config), sep="/").items():
        module, leaf = path.rsplit("/", 1)
        pattern = f"{MODULES[module]}.{LEAVES[leaf]}"
        stacked = "{}" in pattern
        shape = layouts.merge_axes(path, array.shape[1:] if stacked else array.shape)
        if module == "vision/patch_embedding/proj":
            shape = (vision.embed_dim, *convolution)
        names = tuple(pattern.format(i) for i in range(array.shape[0])) if stacked else (pattern,)
        found.append(Leaf(path, array.shape, names, shape, stacked))
    return found
