"""Padding prompts to a few sizes, so that programs are compiled per size, not per length."""

from collections.abc import Sequence

from lattejax.data.prompts import Bounds, EncodedPrompt, PromptEncoder, largest_images
from lattejax.models.qwen2_vl import Prompts

LEAST_TOKENS = 32
FACTOR = 4  # between a size and the next where every program is compiled in advance


def bucket(size: int) -> int:
    """Rounds up to the next of 1, 2, …, 8, 10, 12, 14, 16, 20, …: four sizes per doubling, at most a quarter more."""
    step = max(1, 2 ** ((size - 1).bit_length() - 3))
    return -(-size // step) * step


def padded_length(tokens: int) -> int:
    """The length to which prompts are padded if the longest has `tokens` tokens."""
    return max(LEAST_TOKENS, bucket(tokens))


def padded(
    encoder: PromptEncoder, prompts: Sequence[EncodedPrompt], among: Sequence[EncodedPrompt] | None = None
) -> Prompts:
    """Pads prompts to sizes that fit all prompts in `among`; None: that fit these prompts."""
    among = prompts if among is None else among
    length = max(len(prompt.input_ids) for prompt in among)
    largest, block = largest_images(among), encoder.merge**2
    bounds = Bounds(bucket(largest.images), bucket(-(-largest.patches // block)) * block)
    return encoder.batch(prompts, padded_length(length), bounds)


def sizes_up_to(least: int, most: int) -> tuple[int, ...]:
    """Sizes from `least`, each `FACTOR` times the one before, ending with `most`; the size before it is at most half of
    `most`."""
    sizes = []
    while 2 * least <= most:
        sizes.append(least)
        least *= FACTOR
    return (*sizes, most)


def fitting(sizes: Sequence[int], count: int) -> int:
    """The smallest of the rising sizes that is at least `count`, or the largest of all."""
    return next((size for size in sizes if size >= count), sizes[-1])
