"""The VLM's geometry, which the weights that a config starts from decide."""

import copy
import dataclasses
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lattejax import configuration
from lattejax.configuration import Config
from lattejax.errors import UserError
from lattejax.models.qwen2_vl import VLMConfig
from lattejax.runs.run import Run, open_vlm
from lattejax.runs.workdir import Workdir


def resolve_config(
    config: ConfigDict | dict[str, Any], *, weights_needed: bool = True, workdir: epath.PathLike | None = None
) -> Config:
    """Resolves a config, with the geometry of the weights in `pretrain.init_from`, if there are any.

    Keys of `model.text` and `model.vision` that are at their defaults get the weights' values. Others stay as they are;
    training refuses those that differ from the weights'.

    Args:
      config: what a config file returns.
      weights_needed: whether missing weights are an error; otherwise the config's own geometry is taken.
      workdir: a run that may resume with this config. If it has copied those weights, they need not be there any more.

    Raises:
      UserError: see `configuration.resolve`; or the weights are missing or damaged.
    """
    values = copy.deepcopy(configuration.to_dict(config))
    source = values.get("pretrain", {}).get("init_from") if isinstance(values.get("pretrain"), dict) else None
    if isinstance(source, str) and source:
        try:
            geometry = open_vlm(source).vlm_config
        except UserError:
            geometry = _copied_geometry(workdir, source)
            if weights_needed and geometry is None:
                raise
        if geometry is not None:
            _adopt(values, dataclasses.asdict(geometry))
    return configuration.resolve(values)


def _copied_geometry(workdir: epath.PathLike | None, source: str) -> VLMConfig | None:
    """The geometry of a run that was started from `source`, if it needs it no longer."""
    if workdir is None or not Workdir.at(workdir).config.exists():
        return None
    run = Run.open(workdir)
    return run.vlm_config if run.config.pretrain.init_from == source and run.has_vlm else None


def _adopt(values: dict[str, Any], geometry: dict[str, dict[str, Any]]) -> None:
    usual = configuration.defaults().model.to_dict()
    for tower, keys in geometry.items():
        section = values.get("model", {}).get(tower, {})
        for key, value in keys.items():
            if key in section and _plain(section[key]) == _plain(usual[tower][key]):
                section[key] = value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
