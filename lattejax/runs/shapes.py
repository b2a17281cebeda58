"""The shapes of a config's weights."""

import functools

import jax

from lattejax.configuration import Config
from lattejax.models import latte_flow, qwen2_vl
from lattejax.models.functional import Params


@functools.lru_cache(maxsize=16)  # it takes a quarter of a second, and a run calls it a dozen times
def abstract_params(config: Config) -> Params:
    """Shapes and dtypes of all of the model's weights."""
    model = config.model_config

    def init(key):
        return latte_flow.init(model, qwen2_vl.init(model.vlm, key), key)

    return jax.eval_shape(init, jax.random.key(0))


def abstract_trained(config: Config) -> Params:
    """Shapes and dtypes of the weights that the second stage trains."""
    return latte_flow.split_trained(config.model_config, abstract_params(config))[0]
