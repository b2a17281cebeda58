"""Qwen2-VL's vision tower: patches of an image to tokens of the language model's width.

Follows Qwen2-VL (arXiv 2409.12191) and its implementation in transformers. Images of one call are padded to the same
number of patches, and each attends only to itself.

Axes: B batch, T text token, I image, P patch (in the processor's order: patches that merge are adjacent), D text width,
E vision width.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lattejax.models import functional
from lattejax.models.attention import attention
from lattejax.models.functional import Params
from lattejax.models.layers import Layers, by_rows
from lattejax.models.linear import Linear
from lattejax.models.rotary import Rotary, rotate, vision_rotary
from lattejax.ranges import Depth, Range, Size, check_ranges

Factor = Annotated[int, Range(1, 1024)]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Geometry of the vision tower; the defaults are Qwen2-VL-2B's."""

    depth: Depth = 32
    embed_dim: Size = 1280
    num_heads: Size = 16
    mlp_ratio: Factor = 4
    patch_size: Factor = 14
    temporal_patch_size: Factor = 2
    spatial_merge_size: Factor = 2
    in_channels: Factor = 3
    hidden_size: Size = 1536  # of the language model

    def __post_init__(self):
        check_ranges(self)
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(
                f"embed_dim={self.embed_dim} must be a multiple of 4 * num_heads, {4 * self.num_heads}: rows and "
                "columns each rotate pairs of a head"
            )

    @property
    def patch_dim(self) -> int:
        """The size of one flattened patch: channel, frame, row, column."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


class Images(NamedTuple):
    """Preprocessed images, and the positions of their tokens.

    Every row has I images of P patches; padding is at the end of both axes. For each text token of the row, `index` is
    the index of the merged patch that replaces it, in the row's flattened [I · P / merge²], or -1.
    """

    patches: Float[Array, "B I P patch_dim"]
    positions: Int[Array, "B I P 2"]
    mask: Bool[Array, "B I P"]
    index: Int[Array, "B T"]


class VisionAttention(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.qkv = Linear(config.embed_dim, 3, config.num_heads, config.embed_dim // config.num_heads, rngs=rngs)
        self.proj = Linear(config.embed_dim, config.embed_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "I P E"], rotary: Rotary, mask: Bool[Array, "I P"]) -> Float[Array, "I P E"]:
        q, k, v = rearrange(self.qkv(x), "I P three heads d -> three I P heads d")
        mixed = attention(rotate(q, rotary), rotate(k, rotary), v, mask[:, None])
        return self.proj(rearrange(mixed, "I P heads d -> I P (heads d)"))


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        norm = dict(epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.norm1 = nnx.LayerNorm(config.embed_dim, **norm)
        self.attention = VisionAttention(config, rngs=rngs)
        self.norm2 = nnx.LayerNorm(config.embed_dim, **norm)
        self.fc1 = Linear(config.embed_dim, config.mlp_ratio * config.embed_dim, rngs=rngs)
        self.fc2 = Linear(config.mlp_ratio * config.embed_dim, config.embed_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "I P E"], rotary: Rotary, mask: Bool[Array, "I P"]) -> Float[Array, "I P E"]:
        x = x + self.attention(self.norm1(x), rotary, mask)
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * jax.nn.sigmoid(1.702 * hidden))  # "quick GELU"


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel, that is, a linear map of the flattened patch."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.proj = Linear(config.patch_dim, config.embed_dim, use_bias=False, rngs=rngs)

    def __call__(self, patches: Float[Array, "I P patch_dim"]) -> Float[Array, "I P E"]:
        return self.proj(patches)


class PatchMerger(nnx.Module):
    """Joins each block of merge² neighbouring patches into one token of the language model."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.block = config.spatial_merge_size**2
        self.norm = nnx.LayerNorm(config.embed_dim, epsilon=1e-6, use_fast_variance=False, rngs=rngs)
        self.fc1 = Linear(config.embed_dim * self.block, config.embed_dim * self.block, rngs=rngs)
        self.fc2 = Linear(config.embed_dim * self.block, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "I P E"]) -> Float[Array, "I merged D"]:
        x = rearrange(self.norm(x), "I (P block) E -> I P (block E)", block=self.block)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


def init(config: VisionConfig, key: jax.Array) -> Params:
    """Returns random weights: `patch_embedding`, `blocks` stacked on a leading axis, and `merger`."""
    embedding, blocks, merger = jax.random.split(key, 3)
    return {
        "patch_embedding": functional.init(PatchEmbedding, config, key=embedding),
        "blocks": functional.init_stacked(VisionBlock, config, key=blocks, count=config.depth),
        "merger": functional.init(PatchMerger, config, key=merger),
    }


def encode(config: VisionConfig, params: Params, images: Images, remat: str = "none") -> Float[Array, "B I merged D"]:
    """Returns the tokens of every image; those of padding are meaningless. `remat` is as in `layers.Layers.scan`."""
    patches, positions, mask = (
        rearrange(x, "B I P ... -> (B I) P ...") for x in (images.patches, images.positions, images.mask)
    )
    rotary = vision_rotary(positions, config.embed_dim // config.num_heads)
    embedding = functional.bind(PatchEmbedding, config, params=params["patch_embedding"])
    x = embedding(patches.astype(embedding.proj.weight.dtype))

    def body(x, block):
        return functional.bind(VisionBlock, config, params=block)(by_rows(x), rotary, mask), None

    x, _ = Layers(params["blocks"]).scan(body, x, remat)
    tokens = functional.bind(PatchMerger, config, params=params["merger"])(x)
    return rearrange(tokens, "(B I) merged D -> B I merged D", B=len(images.patches))


def place(
    embeddings: Float[Array, "B T D"], tokens: Float[Array, "B I merged D"], index: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Replaces embeddings by the row's image tokens where `index` is not -1."""
    tokens = rearrange(tokens, "B I merged D -> B (I merged) D")
    chosen = jnp.take_along_axis(tokens, jnp.maximum(index, 0)[..., None], axis=1)
    return jnp.where(index[..., None] >= 0, chosen, embeddings)
