"""A grid of pictures, in rows under their prompts."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LABEL_HEIGHT, SMALLEST_TILE = 4, 18, 64


def labelled_grid(images: np.ndarray, labels: Sequence[str], columns: int = 8) -> Image.Image:
    """Lays out images [labels · n, H, W, 3], the same number for each label, in order; small ones are enlarged.

    Args:
      images: uint8 images, the first label's first.
      labels: one line of text above each block of images.
      columns: the maximum number of images in a row.
    """
    per_label = len(images) // len(labels)
    columns = min(columns, per_label)
    zoom = max(1, -(-SMALLEST_TILE // max(images.shape[1:3])))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = images.shape[1] + MARGIN, images.shape[2] + MARGIN
    block = LABEL_HEIGHT + -(-per_label // columns) * height
    grid = Image.new("RGB", (MARGIN + columns * width, MARGIN + len(labels) * block), "white")
    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(labels):
        top = MARGIN + row * block
        draw.text((MARGIN, top), label, fill="black", font=ImageFont.load_default(12))
        for i in range(per_label):
            place = (MARGIN + i % columns * width, top + LABEL_HEIGHT + i // columns * height)
            grid.paste(Image.fromarray(images[row * per_label + i]), place)
    return grid
