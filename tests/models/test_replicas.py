"""Replicas of a converted VLM's layers compute what the VLM's own layers compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from lattejax.models import functional, generation, latte_flow
from lattejax.models.generation_config import GenerationConfig
from lattejax.models.generation_layer import GenerationLayer
from lattejax.models.latte_flow import ModelConfig
from lattejax.models.layers import Layers
from lattejax.models.rotary import multimodal_rotary
from lattejax.weights.pretrained import Pretrained
from tests import checkpoints


@pytest.mark.parametrize("kv_heads", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4))])
def test_sublayers_equal_transformers_for_one_image_token(kv_heads):
    """For one image token at the prompt's next position, causal and bidirectional attention agree, and the untrained
    time conditioning has no effect. From the same input, attention and feed-forward, before the norms after them,
    equal those of transformers' layers for one more text token."""
    module = checkpoints.random_model(checkpoints.tiny_config(num_key_value_heads=kv_heads))
    converted = Pretrained.open(checkpoints.convert(module))
    encoder, text = converted.encoder, converted.vlm_config.text
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3)).astype(np.uint8))
    prompt = encoder.question("Which digit is this?", [encoder.read_image(picture)])

    taken, attended, fed = [], [], []
    for layer in module.model.language_model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: taken.append(jnp.asarray(inputs[0][:, -1:])))
        layer.self_attn.register_forward_hook(lambda _, __, outputs: attended.append(jnp.asarray(outputs[0][:, -1:])))
        layer.mlp.register_forward_hook(lambda _, __, output: fed.append(jnp.asarray(output[:, -1:])))
    ids = np.append(prompt.input_ids, 50)[None]
    with torch.no_grad():
        module(
            input_ids=torch.tensor(ids),
            mm_token_type_ids=torch.tensor(ids == encoder.image_token).int(),
            pixel_values=torch.tensor(prompt.images[0].patches),
            image_grid_thw=torch.tensor([prompt.images[0].grid]),
        )

    config = ModelConfig(converted.vlm_config, GenerationConfig(text, (1, 1, 4), num_groups=1))
    params = latte_flow.init(config, converted.params("float32"), jax.random.key(0))
    padded = jax.tree.map(jnp.asarray, encoder.batch([prompt], length=len(prompt.input_ids) + 3))
    context = latte_flow.read_prompts(config, params["vlm"], padded)
    positions = generation.image_positions(config.generation, context.next_position)
    rotary = multimodal_rotary(positions, text.head_dim, text.rope_theta, text.mrope_section)
    c = jax.random.normal(jax.random.key(1), (1, text.hidden_size))
    # The previous layer's map may be anything: its gate is zero.
    previous_map = jnp.ones((1, text.num_heads, 1, 1))
    for i, expert in enumerate(Layers(params["experts"]).unstack()):
        layer = functional.bind(GenerationLayer, config.generation.layer, params=expert)
        keys_values = jax.tree.map(lambda x, i=i: x[i], context.layers)
        modulation = layer.modulate(c)
        mixed, _ = layer.attention(taken[i], modulation, rotary, keys_values, context.mask, previous_map)
        # Float32 on both sides: single layers, so errors do not grow.
        np.testing.assert_allclose(mixed, attended[i], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer.feed_forward(taken[i] + attended[i], modulation), fed[i], rtol=1e-5, atol=1e-5)
