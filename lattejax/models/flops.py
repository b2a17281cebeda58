"""Model FLOPs in closed form: two for each multiply-add of a matrix product, nothing for the rest.

Recomputation is not counted, so that rates are comparable across remat policies.
"""

from lattejax.models.conditioning import TIME_CHANNELS
from lattejax.models.generation_config import GenerationConfig
from lattejax.models.text import TextConfig
from lattejax.models.vision import VisionConfig


def decoder_layer(text: TextConfig, tokens: int, seen: int) -> int:
    """One layer on `tokens` tokens that each attend to `seen`."""
    attention = text.hidden_size * text.head_dim * 2 * (text.num_heads + text.num_kv_heads)
    feed_forward = 3 * text.hidden_size * text.intermediate_size
    products = 2 * text.num_heads * text.head_dim * seen
    return 2 * tokens * (attention + feed_forward + products)


def velocity(config: GenerationConfig, context_tokens: int) -> int:
    """One image through one group of M = L/K layers (the mean, if groups differ), including time embedding and
    modulations."""
    text = config.text
    width, tokens = text.hidden_size, config.grid[0] * config.grid[1]
    modulation = 2 * width * (4 * width + config.layer.num_gates)
    layer = decoder_layer(text, tokens, context_tokens + tokens) + modulation
    ends = 2 * tokens * 2 * width * config.token_dim + 2 * width * 2 * width
    time = 2 * (TIME_CHANNELS + width) * width
    return text.num_layers * layer // config.num_groups + ends + time


def reading(text: TextConfig, tokens: int) -> int:
    """One prompt of text through the language model, up to its last layer's output; causal attention counts in full."""
    return text.num_layers * decoder_layer(text, tokens, tokens)


def vision_tower(vision: VisionConfig, patches: int) -> int:
    """One image through the vision tower."""
    width, block = vision.embed_dim, vision.spatial_merge_size**2
    weights = (4 + 2 * vision.mlp_ratio) * width * width
    towers = vision.depth * patches * (weights + 2 * patches * width)
    merger = patches // block * (block * width) * (block * width + vision.hidden_size)
    return 2 * (patches * vision.patch_dim * width + towers + merger)


def question(text: TextConfig, vision: VisionConfig, tokens: int, patches: int) -> int:
    """One question about one image, logits at every token."""
    return reading(text, tokens) + 2 * tokens * text.hidden_size * text.vocab_size + vision_tower(vision, patches)
