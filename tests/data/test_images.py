"""Pictures before encoding: the crop, and every source of pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from lattejax.data.images import decode_image, open_image, square
from lattejax.errors import UserError
from tests.helpers import encoder_for, tiny_config

# ---- The crop


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("width, height", [(17, 16), (31, 40), (16, 16), (9, 5), (200, 64), (65, 131)])
def test_the_crop_is_adms(width, height):
    """Halved while both sides allow, then bicubic, then the centre; halves of even sides are means of four pixels."""
    pixels = noise(width, height)
    while min(pixels.shape[:2]) >= 32:
        image = Image.fromarray(pixels)
        half = np.asarray(image.resize((image.width // 2, image.height // 2), Image.BOX))
        if image.width % 2 == 0 and image.height % 2 == 0:
            means = pixels.reshape(half.shape[0], 2, half.shape[1], 2, 3).mean(axis=(1, 3))
            assert np.abs(half - means).max() <= 1  # rounded twice, along rows and along columns
        pixels = half
    short = min(pixels.shape[:2])
    wanted = tuple(round(side * (16 / short)) for side in pixels.shape[1::-1])
    scaled = np.asarray(Image.fromarray(pixels).resize(wanted, Image.BICUBIC))
    top, left = (scaled.shape[0] - 16) // 2, (scaled.shape[1] - 16) // 2
    expected = scaled[top : top + 16, left : left + 16]
    np.testing.assert_array_equal(square(Image.fromarray(noise(width, height)), 16), expected)


def test_pictures_of_every_mode_become_rgb(tmp_path):
    """Grey, CMYK, palettes; transparent pixels become white; EXIF rotation is applied."""
    assert square(Image.new("L", (8, 8), 7), 4).tolist() == [[[7, 7, 7]] * 4] * 4
    assert square(Image.new("CMYK", (8, 8)), 4).min() == 255
    assert square(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 4).min() == 255
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    assert square(palette, 4).min() == 255
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    half.save(tmp_path / "half.png")
    # The processor's normalised pixels show that a picture is the same wherever it is read.
    on_white = Image.fromarray(np.full((8, 8, 3), square(half, 4)[0, 0]))
    for shown in (open_image(str(tmp_path / "half.png")), half):
        ours, theirs = (encoder_for(tiny_config()).read_image(image).patches for image in (shown, on_white))
        np.testing.assert_array_equal(ours, theirs)
    turned, exif = Image.fromarray(noise(8, 4)), Image.Exif()
    exif[0x0112] = 6  # a rotation by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(open_image(str(tmp_path / "turned.png")), np.rot90(noise(8, 4), -1))


def test_a_line_of_pixels_is_refused_before_it_takes_gigabytes():
    assert square(Image.new("RGB", (200, 1)), 4).shape == (4, 4, 3)
    with pytest.raises(ValueError, match="its 3x603 pixels are more than 200 times as long as wide"):
        square(Image.new("RGB", (3, 603)), 4)


def test_an_image_is_named_when_it_cannot_be_read():
    with pytest.raises(UserError, match=r"the image it cannot be read: .*its format is unknown"):
        decode_image(io.BytesIO(b"text"), "it")
