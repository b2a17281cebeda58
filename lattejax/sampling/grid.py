"""A grid of pictures, in rows under their prompts."""

import textwrap
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
    columns, zoom = min(columns, per_label), zoom_of(images.shape[1:3])
    height, width = (zoom * side + MARGIN for side in images.shape[1:3])
    block = LABEL_HEIGHT + -(-per_label // columns) * height
    grid = Image.new("RGB", grid_size(images.shape[1:3], len(labels), per_label, columns), "white")
    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(labels):
        top = MARGIN + row * block
        draw.text((MARGIN, top), label, fill="black", font=ImageFont.load_default(12))
        for i in range(per_label):
            place = (MARGIN + i % columns * width, top + LABEL_HEIGHT + i // columns * height)
            tile = images[row * per_label + i].repeat(zoom, axis=0).repeat(zoom, axis=1)
            grid.paste(Image.fromarray(tile), place)
    return grid


def zoom_of(shape: tuple[int, int]) -> int:
    """How many times as high and wide images of H and W pixels are shown."""
    return max(1, -(-SMALLEST_TILE // max(shape)))


def grid_size(shape: tuple[int, int], labels: int, per_label: int, columns: int = 8) -> tuple[int, int]:
    """Width and height of the grid of images of H and W pixels."""
    columns, (height, width) = min(columns, per_label), (zoom_of(shape) * side + MARGIN for side in shape)
    return MARGIN + columns * width, MARGIN + labels * (LABEL_HEIGHT + -(-per_label // columns) * height)


LINE_HEIGHT, LINES, SMALLEST_CAPTIONED = 13, 3, 128


def contact_sheet(images: np.ndarray, captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Lays out images [n, H, W, 3] in rows, each with its own caption below, of which at most three lines are shown."""
    zoom = max(1, -(-SMALLEST_CAPTIONED // images.shape[2]))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    texts = [textwrap.wrap(caption, max(8, images.shape[2] // 6))[:LINES] for caption in captions]
    height = images.shape[1] + max(map(len, texts)) * LINE_HEIGHT + 2 * MARGIN
    width = images.shape[2] + MARGIN
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (MARGIN + columns * width, MARGIN + -(-len(images) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left, top = MARGIN + i % columns * width, MARGIN + i // columns * height
        sheet.paste(Image.fromarray(image), (left, top))
        for line, text in enumerate(lines):
            draw.text((left, top + images.shape[1] + line * LINE_HEIGHT), text, fill="black", font=font)
    return sheet
