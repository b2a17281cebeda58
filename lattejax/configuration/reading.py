"""From an experiment's ConfigDict, or a run's JSON, to a typed `Config`, and back."""

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

import lattejax
from lattejax.configuration.config import Config
from lattejax.configuration.earlier import RETIRED, migrate
from lattejax.configuration.sections import BEFORE, Settings
from lattejax.errors import UserError
from lattejax.files import read_json, write_atomically

VERSION = "lattejax_version"  # beside the keys in a run's config.json: the version that wrote it


def defaults() -> ConfigDict:
    """A config with every key at its default, for an experiment to start from."""
    return ConfigDict(dataclasses.asdict(Config()))


def check_key(key: str) -> None:
    """Raises `UserError` for an unknown key, and names the known keys with the most similar spelling."""
    known = known_keys()
    if key in RETIRED:
        raise UserError(f"config key {key} has been removed: use {RETIRED[key]}")
    if key not in known and not key.startswith(tuple(f"{name}." for name in free_keys())):
        close = difflib.get_close_matches(key, known, n=3, cutoff=0.3)
        raise UserError(f"unknown config key {key}; the nearest known are {', '.join(close or known)}")


def _fields(cls: type) -> dict[str, type]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every key of a config, with dots for sections."""
    keys = []
    for name, kind in _fields(cls).items():
        nested = known_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
        keys.extend(nested)
    return keys


def free_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """The config keys that hold free-form `Settings`."""
    keys = []
    for name, kind in _fields(cls).items():
        keys += [prefix + name] * (kind is Settings)
        keys += free_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else []
    return keys


def _convert(kind: Any, value: Any, path: str) -> Any:
    if kind is Settings:
        if not isinstance(value, dict) or not all(isinstance(settings, dict) for settings in value.values()):
            raise UserError(f"config.{path}={value!r} must have a section of settings for each name")
        try:
            return Settings(json.loads(json.dumps(value)))  # as it comes back from a run's config.json
        except TypeError as error:
            raise UserError(f"config.{path}={value!r} has a value that JSON cannot represent: {error}") from error
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path + ".")
    if isinstance(kind, types.GenericAlias):  # tuple[int, int, int] or tuple[str, ...]
        items = typing.get_args(kind)
        if not isinstance(value, (tuple, list)) or (Ellipsis not in items and len(value) != len(items)):
            raise UserError(f"config.{path}={value!r} must be a tuple like {kind}")
        return tuple(_convert(items[0], item, path) for item in value)
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise UserError(f"config.{path} is a number of too many digits") from None
    if type(value) is not kind:
        raise UserError(f"config.{path}={value!r} is of type {type(value).__name__}; expected {kind.__name__}")
    return value


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"config.{prefix[:-1]}={values!r} must be a section with keys {', '.join(_fields(cls))}")
    fields = _fields(cls)
    for name in values:
        if name not in fields:
            check_key(f"{prefix}{name}")
    # A key that was added later may be missing if its default keeps the earlier behaviour.
    added = {f.name: f.metadata[BEFORE] for f in dataclasses.fields(cls) if BEFORE in f.metadata}
    values = {f.name: f.default for f in dataclasses.fields(cls) if added.get(f.name, f) == f.default} | values
    missing = [name for name in fields if name not in values]
    if missing:
        before = [f"{prefix}{key}={added[key]!r} keeps the earlier behaviour" for key in missing if key in added]
        raise UserError("; ".join([f"the config lacks {', '.join(prefix + name for name in missing)}", *before]))
    arguments = {name: _convert(kind, values[name], prefix + name) for name, kind in fields.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"config.{prefix}{error}") from error


def resolve(config: ConfigDict | dict[str, Any]) -> Config:
    """Checks a config file's dict and returns it typed; raises `UserError` for an unknown key or an invalid value."""
    return _build(Config, migrate(to_dict(config)), "")


def to_dict(config: Any) -> dict[str, Any]:
    """What a config file returns, as a dictionary; raises `UserError` if it is none."""
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    if not isinstance(values, dict):
        raise UserError(f"a config must be a dictionary; get_config() returns {values!r:.100}")
    return values


def save(config: Config, path: epath.Path) -> None:
    values = dataclasses.asdict(config) | {VERSION: lattejax.__version__}
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def load(path: epath.Path) -> Config:
    """Reads the config of a run or an export. A key that is missing because it was added later gets the value of the
    earlier behaviour. Raises `UserError` for an unknown key, as in a run of a later version."""
    values = migrate(read_json(path))
    version = values.pop(VERSION, "0.1.0")  # earlier versions did not write it
    for key, before in keys_added().items():
        *sections, name = key.split(".")
        section = functools.reduce(_section, sections, values)
        if isinstance(section, dict):
            section.setdefault(name, before)
    free = tuple(f"{name}." for name in free_keys())
    if unknown := sorted(key for key in set(_flat(values)) - set(known_keys()) if not key.startswith(free)):
        raise UserError(
            f"{path} has {', '.join(unknown)}, unknown to lattejax {lattejax.__version__}; it was written by {version}"
        )
    return resolve(values)


def _section(values: Any, name: str) -> Any:
    """A section of a config; empty if there is none, which `resolve` will refuse."""
    return values.get(name, {}) if isinstance(values, dict) else {}


def keys_added(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """The keys that were added later, each with the value that keeps the earlier behaviour."""
    found = {}
    for name, kind in _fields(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= keys_added(kind, f"{prefix}{name}.")
    return found | {prefix + f.name: f.metadata[BEFORE] for f in dataclasses.fields(cls) if BEFORE in f.metadata}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key."""

    def items(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for name, item in value.items():
                yield from items(item, f"{path}.{name}".strip("."))
        else:
            yield path, value

    return dict(items(values, ""))


def differences(ours: Config, theirs: Config) -> list[str]:
    """Lists the keys in which two configs differ, as `key: theirs -> ours`."""
    old, new = _flat(dataclasses.asdict(theirs)), _flat(dataclasses.asdict(ours))
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key)]


def describe(config: Config) -> str:
    """Every key with its value, one per line; values other than the default are marked with the default."""
    usual = _flat(dataclasses.asdict(Config()))
    return "\n".join(
        f"{key} = {value!r}" if value == usual.get(key) else f"{key} = {value!r}  # not {usual.get(key)!r}"
        for key, value in _flat(dataclasses.asdict(config)).items()
    )
