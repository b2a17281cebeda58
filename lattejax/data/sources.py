"""The data sets that `config.data.source` can name; `examples.Source` is their interface."""

import importlib
from collections.abc import Callable

from lattejax.configuration import Config
from lattejax.data.examples import Source
from lattejax.data.identity import Identity
from lattejax.errors import UserError

# The location of each class. It is imported on demand, because the data sets' dependencies are slow to import.
SOURCES = {
    "digits": "lattejax.data.digits:DigitSource",
    "latents": "lattejax.data.latents:LatentSource",
}


def open_source(config: Config, autoencoder: Callable[[], Identity]) -> Source:
    """Opens the config's data set; see `Source.open`."""
    name = config.data.source
    if name not in SOURCES:
        raise UserError(f"config.data.source={name!r} is unknown; use one of {', '.join(SOURCES)}")
    module, _, cls = SOURCES[name].partition(":")
    return getattr(importlib.import_module(module), cls).open(config, autoencoder)
