"""Janus-Pro in transformers: another unified model, which draws an image token by token.

The geometry is that of Janus-Pro-1B (arXiv 2501.17811), whose language model has 1.6 billion parameters including
embedding and head; the weights are random. Its vision tower, which drawing does not use, has one layer instead of 24,
and its decoder of image tokens is omitted.
"""

import numpy as np
import torch
from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration

VOCABULARY, BEGIN, IMAGE, BEGIN_IMAGE, PAD = 102_400, 100_000, 100_581, 100_016, 100_002


def geometry() -> JanusConfig:
    text = dict(
        model_type="llama",
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=16_384,
        bos_token_id=BEGIN,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    vision = dict(num_hidden_layers=1, projection_dim=2048)
    return JanusConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, tie_word_embeddings=False)


class Janus:
    """Draws a batch of images with guidance: 576 tokens each, one after the other, with a KV cache."""

    def __init__(self, batch_size: int, prompt_tokens: int, guidance: float):
        self.model = JanusForConditionalGeneration(geometry()).eval()
        ids = np.random.default_rng(0).integers(BEGIN, size=(batch_size, prompt_tokens))
        ids[:, 0], ids[:, -1] = BEGIN, BEGIN_IMAGE
        self.inputs = dict(inputs=torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long))
        self.settings = GenerationConfig(
            do_sample=True,
            guidance_scale=guidance,
            bos_token_id=BEGIN,
            pad_token_id=PAD,
            max_length=prompt_tokens + 576,
            generation_kwargs={"boi_token_id": BEGIN_IMAGE},
        )

    def draw(self) -> np.ndarray:
        """The images' tokens [batch, 576]."""
        tokens = self.model.generate(**self.inputs, generation_config=self.settings, generation_mode="image").numpy()
        assert tokens.shape[1] == 576
        return tokens
