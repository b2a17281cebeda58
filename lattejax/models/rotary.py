"""Rotary position embeddings: M-RoPE over (time, row, column) for tokens, and the vision tower's (row, column) form.

Follows Qwen2-VL (arXiv 2409.12191, section 2.1) and its implementation in transformers.

Axes: B batch, tokens of text or of an image, I image, d head dimension.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Cosines and sines, each with one row of d entries per token; they broadcast over heads.
Rotary = tuple[Float[Array, "... tokens d"], Float[Array, "... tokens d"]]


def _frequencies(channels: int, theta: float) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, channels, 2) / channels)


def multimodal_rotary(
    position_ids: Int[Array, "B 3 tokens"], head_dim: int, theta: float, sections: tuple[int, int, int]
) -> Rotary:
    """Returns the cosines and sines of M-RoPE.

    The head's d/2 frequencies are split into `sections`: the first section rotates with the time position, the second
    with the row, the third with the column. A text token has the same position on all three, which is ordinary RoPE.
    """
    axis = np.repeat(np.arange(3), sections)  # [d/2]: the axis that each frequency follows
    angles = position_ids[:, axis].swapaxes(1, 2) * jnp.asarray(_frequencies(head_dim, theta))
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def vision_rotary(positions: Int[Array, "I tokens 2"], head_dim: int, theta: float = 10_000.0) -> Rotary:
    """Returns the vision tower's cosines and sines: half the frequencies follow the row, half the column."""
    angles = positions[..., None] * jnp.asarray(_frequencies(head_dim // 2, theta))  # [I, P, 2, d/4]
    angles = angles.reshape(*angles.shape[:-2], -1)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B tokens heads d"], rotary: Rotary) -> Float[Array, "B tokens heads d"]:
    """Rotates each pair (x[i], x[i + d/2]) by its angle; in at least float32, and rounded once."""
    cos, sin = (table[..., None, :] for table in rotary)
    first, second = jnp.split(x, 2, axis=-1)
    return (x * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)


def token_positions(
    input_ids: np.ndarray, grids: list[tuple[int, int, int]], image_token: int, merge: int
) -> np.ndarray:
    """Returns the (time, row, column) positions [3, T] of one unpadded prompt; runs on the host.

    Text positions increase on all three axes at once. An image's tokens share the next time position p and are at
    (p, p + row, p + column); the text after it starts at one more than the largest position so far.

    Args:
      input_ids: token ids [T], with one `image_token` for each merged patch.
      grids: (frames, rows, columns) of each image in patches, in the order of the prompt.
      image_token: the id of `<|image_pad|>`.
      merge: the vision tower's spatial merge size.

    Raises:
      ValueError: the image tokens do not add up to the grids.
    """
    columns: list[np.ndarray] = []
    images = iter(grids)
    image_tokens = np.flatnonzero(np.asarray(input_ids) == image_token)
    start = index = 0
    while index < len(input_ids):
        if input_ids[index] == image_token:
            frames, rows, cols = next(images, (0, 0, 0))
            block = np.indices((frames, rows // merge, cols // merge)).reshape(3, -1) + start
            if block.shape[1] == 0 or np.any(input_ids[index : index + block.shape[1]] != image_token):
                raise ValueError(f"the prompt's image tokens do not match the image grids {grids}")
        else:
            following = image_tokens[np.searchsorted(image_tokens, index) :]  # text up to the next image at once
            end = following[0] if len(following) else len(input_ids)
            block = np.tile(np.arange(start, start + end - index), (3, 1))
        columns.append(block)
        start = block.max() + 1
        index += block.shape[1]
    if next(images, None) is not None or index != len(input_ids):
        raise ValueError(f"the prompt's image tokens do not match the image grids {grids}")
    return np.concatenate(columns, axis=1).astype(np.int32)


def patch_positions(grid: tuple[int, int, int], merge: int) -> np.ndarray:
    """Returns (row, column) [P, 2] of an image's patches in the processor's order, merge blocks together; host code."""
    frames, rows, cols = grid
    positions = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1)
    blocks = positions.reshape(rows // merge, merge, cols // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return np.tile(blocks.reshape(-1, 2), (frames, 1)).astype(np.int32)
