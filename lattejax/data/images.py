"""Reading image files, and cropping images to squares."""

import io
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from lattejax.errors import parsing
from lattejax.files import read_bytes, resolve_path

CROP = "ADM centre crop"  # of `square`, as it is recorded


def open_image(path: epath.PathLike) -> Image.Image:
    """Opens an image file, rotated by its EXIF orientation; raises `UserError` if it is missing or not an image."""
    return on_white(decode_image(io.BytesIO(read_bytes(resolve_path(path))), str(path)))


def on_white(image: Image.Image) -> Image.Image:
    """Returns an image in RGB, with transparent pixels on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_image(
    opened: BinaryIO | io.BytesIO, name: str, *, turn: bool = True, formats: Sequence[str] | None = None
) -> Image.Image:
    """Reads a complete image, rotated by its EXIF orientation unless `turn` is false. `formats` are Pillow's names of
    those that are read; None: all that it knows.

    Raises:
      UserError: it cannot be read, or its grey levels are not of 8 bits, for which no conversion is defined.
    """
    with parsing(f"the image {name}"):
        try:
            image = Image.open(opened, formats=formats)
        except UnidentifiedImageError:
            raise ValueError("its format is unknown") from None
        image.load()
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are of mode {image.mode}; save it with 8 bits per channel")
        return ImageOps.exif_transpose(image) if turn else image


LONGEST = 200  # times an image's shorter side; the same bound as that of Qwen2-VL's processor


def square(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the centre crop of ADM's evaluation, which all FIDs on ImageNet have used since.

    The image is halved with a box filter while its shorter side is at least twice `size`, resized to `size` with
    bicubic interpolation, and cropped at the centre (github.com/openai/guided-diffusion, `center_crop_arr`).
    Transparent pixels become white.

    Raises:
      ValueError: the image is more than `LONGEST` times as long as wide: it would take gigabytes to resize.
    """
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"its {image.width}x{image.height} pixels are more than {LONGEST} times as long as wide")
    image = on_white(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]
