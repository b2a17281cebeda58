"""Opening a config's data set, with its autoencoder."""

from lattejax.configuration import Config
from lattejax.data.examples import Source
from lattejax.data.sources import open_source
from lattejax.weights.autoencoders import StoredAutoencoder


def open_data(config: Config) -> Source:
    """Opens the config's data set. Raises `UserError` also if its latents are of another autoencoder."""
    return open_source(config, lambda: StoredAutoencoder.open(config.data.autoencoder).identity)
