"""Autoencoder checkpoints: DC-AE and TAESD in diffusers' format, and TAESD in its own two files."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lattejax.errors import UserError, parsing
from lattejax.files import read_json
from lattejax.models.autoencoders import Autoencoder, NetworkConfig
from lattejax.models.dc_ae import DCAEConfig, Stage
from lattejax.models.functional import Params
from lattejax.models.taesd import TAESDConfig
from lattejax.weights.convolutions import assemble
from lattejax.weights.shards import Shards

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
TAESD_FILES = {"encoder": "*_encoder.safetensors", "decoder": "*_decoder.safetensors"}


def is_autoencoder(directory: epath.Path) -> bool:
    """Whether a directory holds an autoencoder: one of diffusers' classes, or TAESD's two files."""
    if (directory / CONFIG).exists():
        return "_class_name" in read_json(directory / CONFIG)
    return all(any(directory.glob(pattern)) for pattern in TAESD_FILES.values())


def read_checkpoint(directory: epath.Path) -> tuple[NetworkConfig, Params, dict[str, str]]:
    """Reads an autoencoder: its geometry, its float32 weights, and the SHA-256 of its weight files.

    Raises:
      UserError: a name or a shape does not match the config, or a file is missing or truncated.
    """
    if (directory / CONFIG).exists():
        return *read(directory), Shards.open(directory, WEIGHTS).hashes()
    files = {part: sorted(directory.glob(pattern)) for part, pattern in TAESD_FILES.items()}
    for part, found in files.items():
        if len(found) != 1:
            raise UserError(f"{directory} has {len(found)} files {TAESD_FILES[part]}, expected one")
    (encoder,), (decoder,) = files["encoder"], files["decoder"]
    hashes = [Shards.open(file.parent, file.name).hashes() for file in (encoder, decoder)]
    return *read_taesd(encoder, decoder), hashes[0] | hashes[1]


def listed_scaling(directory: epath.Path) -> tuple[Any, Any]:
    """Returns the scale and the shift of latents that a checkpoint states; None if it states none.

    A DC-AE's scale of 1 counts as none: diffusers writes it for a checkpoint that stated no scale. TAESD's own files
    are for unscaled latents.
    """
    if not (directory / CONFIG).exists():
        return 1.0, 0.0
    values = read_json(directory / CONFIG)
    scale, shift = values.get("scaling_factor"), values.get("shift_factor")
    if values["_class_name"] == "AutoencoderDC" and scale == 1:
        scale = None
    return scale, shift


def read_geometry(directory: epath.Path) -> NetworkConfig:
    """Returns the geometry that a checkpoint's config.json describes.

    Raises:
      UserError: it is missing, is of another class, lacks a key, or asks for something unsupported.
    """
    path = directory / CONFIG
    values = read_json(path)
    if values.get("_class_name") not in CLASSES:
        raise UserError(f"{directory} holds a {values.get('_class_name')!r}; expected one of {list(CLASSES)}")
    with parsing(f"{path}, the config of an {values['_class_name']},"):
        return CLASSES[values["_class_name"]](values)


# How a DC-AE changes resolution, by name. diffusers takes every other name for a convolution; sana-1.0's is "Conv".
DOWN = {"pixel_unshuffle": True, "conv": False, "Conv": False}
UP = {"pixel_shuffle": True, "interpolate": False}


def _known(values: dict, name: str, known: dict[Any, bool]) -> bool:
    value = values[name]
    if value not in known:
        raise ValueError(f"{name}={value!r:.100} is not supported; only {', '.join(map(repr, known))}")
    return known[value]


def _switch(values: dict, name: str) -> bool:
    value = values.get(name, True)
    if type(value) is not bool:
        raise ValueError(f"{name}={value!r:.100} must be true or false")
    return value


def _dc_ae(values: dict) -> DCAEConfig:
    return DCAEConfig(
        encoder=_stages(values, "encoder", norms="rms_norm", activations="silu"),
        decoder=_stages(values, "decoder", values["decoder_norm_types"], values["decoder_act_fns"]),
        in_channels=values["in_channels"],
        latent_channels=values["latent_channels"],
        head_dim=values["attention_head_dim"],
        unshuffle=_known(values, "downsample_block_type", DOWN),
        shuffle=_known(values, "upsample_block_type", UP),
        encoder_shortcut=_switch(values, "encoder_out_shortcut"),
        decoder_shortcut=_switch(values, "decoder_in_shortcut"),
        last_activation=values.get("decoder_conv_act_fn", "relu"),
    )


def _stages(values: dict, part: str, norms: str | list[str], activations: str | list[str]) -> tuple[Stage, ...]:
    widths = values[f"{part}_block_out_channels"]

    def each(of_stages: str | list[str]) -> list[str]:
        return [of_stages] * len(widths) if isinstance(of_stages, str) else of_stages

    columns = zip(
        widths,
        values[f"{part}_layers_per_block"],
        each(values[f"{part}_block_types"]),
        each(norms),
        each(activations),
        map(tuple, values[f"{part}_qkv_multiscales"]),
        strict=True,
    )
    return tuple(Stage(*column) for column in columns)


def _taesd(values: dict) -> TAESDConfig:
    for name, supported in (("act_fn", "relu"), ("upsample_fn", "nearest"), ("upsampling_scaling_factor", 2)):
        if (value := values.get(name, supported)) != supported:  # older ones lack some, which had these values
            raise ValueError(f"{name}={value!r} is not supported; only {supported!r} is")
    if len({*values["encoder_block_out_channels"], *values["decoder_block_out_channels"]}) != 1:
        raise ValueError("the widths of all blocks must be the same")
    return TAESDConfig(
        width=values["encoder_block_out_channels"][0],
        encoder_blocks=tuple(values["num_encoder_blocks"]),
        decoder_blocks=tuple(values["num_decoder_blocks"]),
        in_channels=values["in_channels"],
        latent_channels=values["latent_channels"],
    )


def write_geometry(checkpoint: epath.Path, config: NetworkConfig, out: epath.Path) -> None:
    """Writes a checkpoint's config.json: a copy of it, or for TAESD's two files the one that diffusers would write."""
    if (checkpoint / CONFIG).exists():
        (out / CONFIG).write_bytes((checkpoint / CONFIG).read_bytes())
        return
    values = {
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
        "encoder_block_out_channels": [config.width] * len(config.encoder_blocks),
        "decoder_block_out_channels": [config.width] * len(config.decoder_blocks),
        "num_encoder_blocks": config.encoder_blocks,
        "num_decoder_blocks": config.decoder_blocks,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
    }
    (out / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


CLASSES = {"AutoencoderDC": _dc_ae, "AutoencoderTiny": _taesd}


def read(directory: epath.Path) -> tuple[NetworkConfig, Params]:
    """Reads a checkpoint: its geometry and its float32 weights.

    Raises:
      UserError: a name or a shape does not match the config, the config is of a network that cannot run, or a file is
        missing or truncated.
    """
    config, stored = read_geometry(directory), Shards.open(directory, WEIGHTS)
    _check_runs(config, directory / CONFIG)
    return config, _assemble(config, stored.shapes, stored.read, directory / CONFIG)


def _check_runs(config: NetworkConfig, source: epath.Path) -> None:
    """Raises `UserError` for a geometry that cannot encode and decode, such as channels that do not divide: encoding
    would be the first to notice. Computes shapes only."""
    autoencoder, side = Autoencoder(config), config.compression
    with parsing(f"{source} describes a network that cannot run, so it"):
        params = jax.eval_shape(autoencoder.init, jax.random.key(0))
        images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        latents = jax.eval_shape(autoencoder.encode, params["encoder"], images)
        jax.eval_shape(autoencoder.decode, params["decoder"], latents)


def read_taesd(encoder: epath.Path, decoder: epath.Path) -> tuple[TAESDConfig, Params]:
    """Reads TAESD's two files, whose tensors are named by the index of their layer.

    Raises:
      UserError: a file is missing or truncated, or its tensors are not TAESD's.
    """
    parts = {part: Shards.open(file.parent, file.name) for part, file in (("encoder", encoder), ("decoder", decoder))}
    # diffusers' decoder begins with a convolution, TAESD's with the clamp.
    first = {"encoder": 0, "decoder": 1}
    places = {
        f"{part}.layers.{int(number) - first[part]}.{rest}": (part, f"{number}.{rest}")
        for part, shards_of_part in parts.items()
        for number, rest in (name.split(".", 1) for name in shards_of_part.files)
    }
    shapes = {name: parts[part].shapes[stored] for name, (part, stored) in places.items()}
    channels = shapes.get("decoder.layers.0.weight", (0, 0))[1]
    config = TAESDConfig(latent_channels=channels)
    return config, _assemble(config, shapes, lambda name: parts[places[name][0]].read(places[name][1]), encoder)


def _assemble(config: NetworkConfig, shapes: Mapping, read_tensor: Callable[[str], np.ndarray], source: Any) -> Params:
    return assemble(jax.eval_shape(Autoencoder(config).init, jax.random.key(0)), shapes, read_tensor, source)
