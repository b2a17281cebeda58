"""DC-AE checkpoints as diffusers keeps them: config.json and safetensors.

Scaling is not read: some of the published config files do not say it, and a wrong scale goes unnoticed.
"""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from lattejax.errors import UserError
from lattejax.files import read_json
from lattejax.models import dc_ae
from lattejax.models.dc_ae import DCAEConfig, Stage
from lattejax.models.functional import Params
from lattejax.weights import shards
from lattejax.weights.shards import Shards

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def read_geometry(directory: epath.Path) -> DCAEConfig:
    """Returns the geometry that a checkpoint's config.json describes.

    Raises:
      UserError: it is not there, is no AutoencoderDC, or lacks a key.
    """
    path = directory / CONFIG
    values = read_json(path)
    if values.get("_class_name") != "AutoencoderDC":
        raise UserError(f"{directory} holds a {values.get('_class_name')!r}, expected an 'AutoencoderDC'")
    try:
        return DCAEConfig(
            encoder=_stages(values, "encoder", norms="rms_norm", activations="silu"),
            decoder=_stages(values, "decoder", values["decoder_norm_types"], values["decoder_act_fns"]),
            in_channels=values["in_channels"],
            latent_channels=values["latent_channels"],
            head_dim=values["attention_head_dim"],
            unshuffle=values["downsample_block_type"] == "pixel_unshuffle",
            shuffle=values["upsample_block_type"] == "pixel_shuffle",
            encoder_shortcut=values.get("encoder_out_shortcut", True),
            decoder_shortcut=values.get("decoder_in_shortcut", True),
            last_activation=values.get("decoder_conv_act_fn", "relu"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an AutoencoderDC's config: {error}") from error


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


def read(directory: epath.Path) -> tuple[DCAEConfig, Params]:
    """Reads a checkpoint: its geometry and its float32 weights.

    Raises:
      UserError: a name or a shape is not what the config asks for, or a file is missing or cut short.
    """
    config, stored = read_geometry(directory), Shards.open(directory, WEIGHTS)
    paths = traverse_util.flatten_dict(jax.eval_shape(lambda: dc_ae.init(config, jax.random.key(0))), sep="/")
    names = {path: _name(path) for path in paths}
    want = {names[path]: _to_torch(array.shape) for path, array in paths.items()}
    shards.check_tensors(stored.shapes, want, directory / CONFIG)
    weights = {path: jnp.asarray(_from_torch(stored.read(name)), jnp.float32) for path, name in names.items()}
    return config, traverse_util.unflatten_dict(weights, sep="/")


def _name(path: str) -> str:
    module, leaf = path.rsplit("/", 1)
    return f"{module.replace('/', '.')}.{LEAVES[leaf]}"


def _to_torch(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[height, width, in, out] is PyTorch's [out, in, height, width], and [in, out] its [out, in]."""
    return (*shape[::-1][:2], *shape[:-2])


def _from_torch(tensor: np.ndarray) -> np.ndarray:
    return np.moveaxis(tensor, (0, 1), (-1, -2)) if tensor.ndim > 1 else tensor
