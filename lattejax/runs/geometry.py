"""The VLM's geometry, which the weights that a config starts from decide."""

import copy
import dataclasses
from typing import Any

from ml_collections import ConfigDict

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.errors import UserError
from lattejax.runs.run import open_vlm


def resolve_config(config: ConfigDict | dict[str, Any], *, weights_needed: bool = True) -> Config:
    """Resolves a config, with the geometry of the weights in `pretrain.init_from`, if there are any.

    Keys of `model.text` and `model.vision` that are at their defaults get the weights' values. Others stay as they are;
    training refuses those that differ from the weights'.

    Args:
      config: what a config file returns.
      weights_needed: whether missing weights are an error; otherwise the config's own geometry is taken.

    Raises:
      UserError: see `configuration.resolve`; or the weights are missing or damaged.
    """
    values = copy.deepcopy(configuration.to_dict(config))
    source = values.get("pretrain", {}).get("init_from") if isinstance(values.get("pretrain"), dict) else None
    if isinstance(source, str) and source:
        try:
            geometry = dataclasses.asdict(open_vlm(source).vlm_config)
        except UserError:
            if weights_needed:
                raise
        else:
            _adopt(values, geometry)
    return configuration.resolve(values)


def _adopt(values: dict[str, Any], geometry: dict[str, dict[str, Any]]) -> None:
    usual = configuration.defaults().model.to_dict()
    for tower, keys in geometry.items():
        section = values.get("model", {}).get(tower, {})
        for key, value in keys.items():
            if key in section and _plain(section[key]) == _plain(usual[tower][key]):
                section[key] = value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
