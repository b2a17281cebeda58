"""Pictures that are sent and received: data URIs, and files of the formats that browsers know."""

import base64
import binascii
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from lattejax.data.images import decode_image
from lattejax.errors import UserError, parsing
from lattejax.serving.errors import ApiError

FORMATS = ("png", "webp", "jpeg")
READ = ("PNG", "JPEG", "WEBP", "GIF")


def encode(pixels: np.ndarray, form: str, quality: int) -> str:
    """A picture [H, W, 3] as a file in base64; `quality` is of JPEG and WebP, at 100 the latter is lossless."""
    file = io.BytesIO()
    settings = {} if form == "png" else {"quality": quality}
    if form == "webp" and quality == 100:
        settings = {"lossless": True}
    Image.fromarray(pixels).save(file, format=form.upper(), **settings)
    return base64.b64encode(file.getvalue()).decode()


class Sent(NamedTuple):
    """An image that was sent, as a file."""

    field: str  # where it came
    content: bytes
    size: tuple[int, int]  # width and height, before it is turned by its EXIF orientation

    def decode(self) -> Image.Image:
        """Reads its pixels.

        Raises:
          ApiError: the file is damaged.
        """
        try:
            return decode_image(io.BytesIO(self.content), "that was sent", formats=READ)
        except UserError as error:
            raise _invalid(self.field, error) from None


def from_data_uri(uri: str, most_pixels: int, field: str) -> Sent:
    """Reads the head of an image that came as a data URI; nothing is fetched or decoded.

    Raises:
      ApiError: it is no data URI, no image, or has too many pixels.
    """
    head, comma, data = uri.partition(",")
    if not head.startswith("data:"):
        message = f"{field} must be a data URI (data:image/png;base64,…): images are not fetched from elsewhere"
        raise ApiError(400, message, field, "remote_url_refused")
    if not comma or not head.endswith(";base64"):
        raise ApiError(400, f"{field} must be in base64", field, "invalid_image")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{field} is no base64: {error}", field, "invalid_image") from None
    try:
        with parsing("the image"):
            width, height = Image.open(io.BytesIO(content), formats=READ).size
    except UserError as error:
        raise _invalid(field, error) from None
    if width * height > most_pixels:
        text = f"{field} has {width} × {height} pixels, more than {most_pixels:,}"
        raise ApiError(413, text, field, "image_too_large")
    return Sent(field, content, (width, height))


def _invalid(field: str, error: UserError) -> ApiError:
    return ApiError(400, f"{field}: {error}", field, "invalid_image")
