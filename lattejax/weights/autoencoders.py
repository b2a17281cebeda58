"""An autoencoder's directory, which `lattejax.convert` makes from a checkpoint, and its reader.

encoder/, decoder/   float32 weights (Orbax); encoding reads the encoder, drawing the decoder
config.json          geometry, as diffusers writes it
autoencoder.json     scale and shift of the latents, and the hash of every weight file; written last

Latents are useless with another scale, shift or network than they were made with, and only bad images would reveal it.
So these three are stored with latents, as an `Identity`, and compared whenever latents are used with an autoencoder.
"""

import dataclasses
import functools
import hashlib
import json

import jax
from etils import epath

from lattejax.configuration import Data
from lattejax.data.identity import Identity
from lattejax.errors import UserError, parsing
from lattejax.files import new_directory, read_json, resolve_path
from lattejax.models.autoencoders import PIXELS, Autoencoder
from lattejax.models.functional import Params
from lattejax.models.pixels import PixelConfig
from lattejax.weights import diffusers, hugging_face, trees

RECORD = "autoencoder.json"


@dataclasses.dataclass(frozen=True)
class StoredAutoencoder:
    """An autoencoder opened for reading; `directory` is None for bare pixels."""

    directory: epath.Path | None
    autoencoder: Autoencoder
    identity: Identity

    @classmethod
    def open(cls, path: str, channels: int = 1) -> "StoredAutoencoder":
        """Opens a converted autoencoder, or "pixels" of so many channels.

        Raises:
          UserError: there is none, or it is incomplete.
        """
        if path == PIXELS:
            return cls(None, Autoencoder(PixelConfig(channels)), Identity(PIXELS, 1.0, 0.0))
        directory = resolve_path(path)
        if not (directory / RECORD).is_file():
            raise UserError(f"{path} holds no converted autoencoder: it has no {RECORD}; make it with lattejax.convert")
        record = read_json(directory / RECORD)
        with parsing(str(directory / RECORD)):
            autoencoder = Autoencoder(diffusers.read_geometry(directory), record["scale"], record["shift"])
            identity = Identity(_fingerprint(record["sha256"], autoencoder), autoencoder.scale, autoencoder.shift)
        return cls(directory, autoencoder, identity)

    @classmethod
    def open_for(cls, data: Data) -> "StoredAutoencoder":
        """Opens a config's autoencoder; raises `UserError` also if image size or latent shape do not fit it."""
        stored = cls.open(data.autoencoder, data.latent_shape[2])
        try:
            shape = stored.autoencoder.latent_shape(data.image_size)
        except ValueError as error:
            raise UserError(f"config.data.{error} of {data.autoencoder}") from error
        if shape != data.latent_shape:
            raise UserError(
                f"config.data.latent_shape={data.latent_shape}, but {data.autoencoder} makes {shape} of "
                f"image_size={data.image_size}"
            )
        return stored

    def weights(self, part: str) -> Params:
        """Reads the weights of the "encoder" or the "decoder"; raises `UserError` if they are damaged."""
        if self.directory is None:
            return {}
        return trees.load_weights(self.directory / part, self._abstract[part])

    @functools.cached_property
    def _abstract(self) -> Params:
        """Describes the weights of both parts; that takes longer than reading those of a small network."""
        return jax.eval_shape(self.autoencoder.init, jax.random.key(0))


def _fingerprint(hashes: dict[str, str], autoencoder: Autoencoder) -> str:
    """One hash of the geometry and of all files' hashes, independent of the files' names."""
    parts = [*sorted(hashes.values()), json.dumps(dataclasses.asdict(autoencoder.network))]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def convert(source: str, out: epath.PathLike, scale: float | None = None, shift: float | None = None) -> None:
    """Converts a checkpoint of diffusers, or TAESD's own files, into the directory `out`.

    Args:
      source: a hub id or a local directory.
      out: the directory to create.
      scale: the scale of the latents; None: as the checkpoint states.
      shift: the shift of the latents; None: as the checkpoint states.

    Raises:
      UserError: the checkpoint is incomplete, states no scale or another scale, or `out` exists. Nothing is left there.
    """
    checkpoint = hugging_face.find(source, weights=False)
    listed_scale, listed_shift = diffusers.listed_scaling(checkpoint)
    if scale is None and listed_scale is None:
        raise UserError(
            f"{source} does not state the scale of its latents; give it with --scale "
            "(published: 0.3189 for dc-ae-f32c32-in-1.0, 0.41407 for dc-ae-f32c32-sana-1.0)"
        )
    for name, given, listed in (("scale", scale, listed_scale), ("shift", shift, listed_shift)):
        if given is not None and listed is not None and given != listed:
            raise UserError(f"--{name}={given}, but {source} states {listed}; leave the flag out")
    scale = listed_scale if scale is None else scale
    shift = next(value for value in (shift, listed_shift, 0.0) if value is not None)
    checkpoint = hugging_face.find(source)
    with parsing(f"the autoencoder {source}"):
        network, params, hashes = diffusers.read_checkpoint(checkpoint)
    try:
        autoencoder = Autoencoder(network, float(scale), float(shift))
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {error}") from error
    with new_directory(out) as directory:
        for part in ("encoder", "decoder"):
            trees.save_weights(directory / part, params[part])
        diffusers.write_geometry(checkpoint, network, directory)
        record = {"source": source, "directory": str(checkpoint), "sha256": hashes}
        record |= {"scale": autoencoder.scale, "shift": autoencoder.shift}
        (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n")
