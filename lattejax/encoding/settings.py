"""The settings that a directory of latents was encoded with. Another encoding belongs into another directory."""

import json
import re
from typing import Any

from etils import epath

from lattejax.configuration import Config
from lattejax.data.images import CROP
from lattejax.data.stored import ENCODING, VERSION
from lattejax.encoding.sources import Records
from lattejax.encoding.written import written_versions
from lattejax.errors import UserError
from lattejax.files import read_json
from lattejax.weights.autoencoders import StoredAutoencoder

NUMBERS = re.compile(r"\{\d+\.\.\d+\}")  # of the files that a pattern names


def settings_of(config: Config, stored: StoredAutoencoder, source: Records) -> dict[str, Any]:
    """The settings that determine the contents, besides the source's own."""
    settings = {
        "version": VERSION,
        "autoencoder": vars(stored.identity),
        "image_size": config.data.image_size,
        "latent_shape": config.data.latent_shape,
        "crop": CROP,
        "flip": config.images.flip,
        "max_pixels": config.data.max_pixels,
        "source": source.identity,
        "train": config.images.train,
        "test": config.images.test,
        "shard_pictures": config.images.shard_pictures,
        "keys": config.images.keys,
    }
    return json.loads(json.dumps(settings))


def check_same(out: epath.Path, settings: dict[str, Any], version: str) -> None:
    """Raises `UserError` if a directory belongs to another encoding."""
    theirs = read_json(out / ENCODING)
    if theirs.get("version", 1) != VERSION:
        raise UserError(
            f"--out={out} was written by another version of lattejax; training reads it, but encode into another --out"
        )
    pairs = {key: (theirs.get(key), value) for key, value in settings.items()}
    was, now = map(str, pairs["source"])
    # Earlier versions stored names from tensorflow-datasets without the configuration, which the source's version has.
    is_former = now.startswith(f"{was}:") and written_versions(out) <= {version}
    if is_former or NUMBERS.sub("*", was) == NUMBERS.sub("*", now):  # it may have grown: {000..012}.tar, {000..015}.tar
        del pairs["source"]
    different = [f"{key} was {was}, is {value}" for key, (was, value) in pairs.items() if was != value]
    if different:
        raise UserError(f"--out={out} was encoded with other settings ({'; '.join(different)}); use another --out")
