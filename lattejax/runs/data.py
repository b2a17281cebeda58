"""Opening a config's data set, with its autoencoder."""

from lattejax.configuration import Config
from lattejax.data.examples import Source
from lattejax.data.sources import open_source
from lattejax.weights.autoencoders import StoredAutoencoder


def open_data(config: Config, autoencoder: str = "") -> Source:
    """Opens the config's data set, with its autoencoder, which is at `autoencoder` if it has moved.

    Raises `UserError` also if its latents are of another autoencoder.
    """
    return open_source(config, lambda: StoredAutoencoder.open(autoencoder or config.data.autoencoder).identity)
