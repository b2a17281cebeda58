"""The manifest of a directory that `lattejax.encode` has written, see `data.stored`."""

import dataclasses
import hashlib
from typing import Any

from etils import epath

from lattejax.data.identity import Identity
from lattejax.data.stored import LATENTS, SPLITS, VERSION, Shard
from lattejax.errors import UserError, parsing
from lattejax.files import read_json


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What training needs to know of a directory, of this version or the first."""

    made_by: Identity
    made: dict[str, Any]  # keys of config.data that must be equal
    captions: tuple[str, ...]
    shards: dict[str, tuple[Shard, ...]]
    views: int
    image_sizes: tuple[tuple[int, int], ...] | None
    most_images: int
    max_pixels: int | None

    @classmethod
    def read(cls, file: epath.Path) -> "Manifest":
        manifest = read_json(file)
        if manifest.get("version", 1) not in (1, VERSION):
            raise UserError(f"{file} was written by a later version of lattejax: {manifest['version']!r}")
        with parsing(f"{file}, which lattejax.encode writes,"):
            encoding, shards = manifest["encoding"], [Shard.parse(shard, file) for shard in manifest["shards"]]
            captions, sizes = tuple(manifest["captions"] or ()), manifest.get("image_sizes", ())
            if not all(isinstance(caption, str) for caption in captions):
                raise TypeError("its captions are no texts")
            # In the first version a record had both, latents and caption, for each view.
            views = 1 if manifest.get("version", 1) == 1 else 1 + bool(encoding["flip"])
            return cls(
                made_by=Identity.parse(encoding["autoencoder"], str(file)),
                made={"image_size": encoding["image_size"], "latent_shape": tuple(encoding["latent_shape"])},
                captions=captions,
                shards={split: tuple(shard for shard in shards if _split(shard) == split) for split in SPLITS},
                views=views,
                image_sizes=None if sizes is None else tuple((int(width), int(height)) for width, height in sizes),
                most_images=int(manifest.get("most_images", 0)),
                max_pixels=encoding.get("max_pixels"),
            )

    @property
    def has_images(self) -> bool:
        return self.most_images > 0

    @property
    def identities(self) -> tuple[str, ...]:
        """The hash of contents, which is the same if the same pictures are encoded again; and the hash of files, which
        may differ then, as earlier runs recorded it."""
        files = [file for shards in self.shards.values() for shard in shards for file in shard.files.values()]
        hashes = [[file.contents for file in files], [file.sha256 for file in files]]
        return tuple(hashlib.sha256(" ".join(of_all).encode()).hexdigest() for of_all in hashes if all(of_all))


def _split(shard: Shard) -> str:
    return shard.files[LATENTS].file.split("-")[1].partition(".")[0]
