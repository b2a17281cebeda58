"""Pictures to encode: pieces of scikit-learn's two photos, stored like users' own pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from lattejax.configuration import Config
from tests.helpers import NO_SCORES, tiny_config

SIZE = 16  # of encoded crops; the tiny autoencoder turns them into 2×2 latents of 8 channels
SUBJECTS = {"china.jpg": "a temple in China", "flower.jpg": "a flower"}


def pieces(count: int) -> list[tuple[str, str, Image.Image]]:
    """Names, captions and pictures of different sizes, portrait and landscape."""
    rng, made = np.random.default_rng(0), []
    for i in range(count):
        subject = list(SUBJECTS)[i % 2]
        height, width = rng.integers(20, 60, 2)
        top, left = rng.integers(0, 300, 2)
        piece = Image.fromarray(load_sample_image(subject)[top : top + height, left : left + width])
        made.append((f"{i:03d}.jpg", SUBJECTS[subject], piece))
    return made


def folder(path: Path, count: int, listed: bool = False) -> Path:
    """Writes pieces as JPEGs, each beside a text file, or listed in metadata.jsonl."""
    path.mkdir()
    lines = []
    for name, caption, image in pieces(count):
        image.save(path / name)
        if listed:
            lines.append(json.dumps({"file_name": name, "text": caption}) + "\n")
        else:
            (path / name).with_suffix(".txt").write_text(caption + "\n")
    if listed:
        (path / "metadata.jsonl").write_text("".join(lines))
    return path


def settings(pictures: Path, autoencoder: Path, **overrides: Any) -> dict[str, Any]:
    """Overrides of the tiny config that train on a folder of pictures."""
    return (
        dict(
            images__source="folder",
            images__name=str(pictures),
            images__train="train[4:]",
            images__test="train[:4]",
            images__batch_size=4,
            images__shard_pictures=6,
            data__source="latents",
            data__latents=str(pictures.with_name("latents")),
            data__autoencoder=str(autoencoder),
            data__image_size=SIZE,
            data__latent_shape=(2, 2, 8),
            data__prompt_length=40,
            pretrain__steps=0,
            eval__prompts=("a flower", "a temple"),
            model__patch_size=1,
        )
        | NO_SCORES
        | overrides
    )


def config(pictures: Path, autoencoder: Path, **overrides: Any) -> Config:
    return tiny_config(**settings(pictures, autoencoder, **overrides))
