"""All accelerator programs lower for GPUs and TPUs, at the flagship's size and in bfloat16, from shapes only."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lattejax import configuration
from lattejax.encoding.encode import encode_pixels
from lattejax.models import qwen2_vl
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.dc_ae import DCAEConfig, Stage
from lattejax.parallel.mesh import one_device
from lattejax.pods import programs
from lattejax.sampling import answers
from lattejax.sampling.images import decode_images
from tests.helpers import config_file

ROWS, TOKENS, CAPACITY = 2, 512, 64


def flagship() -> configuration.Config:
    """configs/imagenet256.py on one device."""
    config = config_file("imagenet256")
    config.mesh.expert = config.mesh.fsdp = 1
    config.train.batch_size = config.eval.batch_size = 16
    return configuration.resolve(config)


def blend() -> configuration.Config:
    """Blend needs questions: those of configs/digits.py, with the flagship's model."""
    config, large = config_file("digits"), config_file("imagenet256")
    config.dtype, config.model, config.data.max_pixels = large.dtype, large.model, 28**2
    config.model.variant, config.train.unroll = "blend", False
    return configuration.resolve(config)


def lowers(function, *arguments, **static) -> None:
    exported = jax.export.export(function, platforms=("cuda", "tpu"))(*arguments, **static)
    assert exported.platforms == ("cuda", "tpu")


def vlm() -> dict:
    """The VLM's weights for inference, in bfloat16, a tree for each layer."""
    weights = jax.eval_shape(functools.partial(qwen2_vl.init, flagship().model_config.vlm), jax.random.key(0))
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), weights)
    return jax.eval_shape(qwen2_vl.unstack, weights)


def token_sampling() -> answers.TokenSampling:
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return answers.TokenSampling(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS)), scalar, scalar)


@pytest.mark.parametrize("config", [flagship, blend])
def test_a_training_step(config):
    program = programs.train_step(config(), one_device(), captions=1000)
    assert {leaf.dtype for leaf in jax.tree.leaves(program.parts["frozen"])} >= {jnp.dtype(jnp.bfloat16)}
    lowers(program.function, *program.arguments)


def test_a_sampling_call():
    program = programs.sampling_call(flagship(), one_device())
    lowers(program.function, *program.arguments, **program.static)


def test_prefill_and_decoding_of_a_token():
    """For prompts with a picture, with sampling and a repetition penalty, which need more than greedy decoding."""
    config, weights = flagship(), vlm()
    model = config.model_config.vlm
    prompts = programs.abstract_prompts(config, ROWS, TOKENS, pictures=1)
    seen = jax.ShapeDtypeStruct((ROWS, model.text.vocab_size), bool)
    penalty = answers.Penalty(jax.ShapeDtypeStruct((), jnp.float32), seen)
    lowers(answers.read, model, weights, prompts, token_sampling(), penalty, capacity=CAPACITY)
    read = functools.partial(answers.read, model, capacity=CAPACITY)
    token, state = jax.eval_shape(read, weights, prompts, token_sampling(), penalty)
    assert state.cache[0].keys.shape == (ROWS, TOKENS + CAPACITY, 2, 128) and len(state.cache) == 28
    count = jax.ShapeDtypeStruct((), jnp.int32)
    lowers(answers.read_token, model, weights, state, token, token_sampling(), count, penalty)


def test_encoding_and_decoding_of_images():
    """With the geometry of dc-ae-f32c32-in-1.0, from its config.json."""
    widths = (128, 256, 512, 512, 1024, 1024)

    def stages(depths, norms, activations):
        blocks = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
        return tuple(map(Stage, widths, depths, blocks, norms, activations))

    batch_norms = stages((0, 5, 10, 2, 2, 2), ["batch_norm"] * 3 + ["rms_norm"] * 3, ["relu"] * 3 + ["silu"] * 3)
    network = DCAEConfig(stages((0, 4, 8, 2, 2, 2), ["rms_norm"] * 6, ["silu"] * 6), batch_norms)
    autoencoder = Autoencoder(network, scale=0.3189)
    weights = jax.eval_shape(autoencoder.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((16, 256, 256, 3), jnp.uint8)
    lowers(encode_pixels, autoencoder, weights["encoder"], images)
    lowers(decode_images, autoencoder, weights["decoder"], jax.ShapeDtypeStruct((16, 8, 8, 32), jnp.float32))
