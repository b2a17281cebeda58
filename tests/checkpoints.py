"""Tiny random checkpoints in the real formats: Qwen2-VL's, written by transformers, and autoencoders', by diffusers."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderTiny
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from lattejax.data import tokenizer as tokenizers
from lattejax.data.digits import DigitSource
from lattejax.data.tokenizer import IMAGE_PAD, TEXT_END, TURN_END, Tokenizer
from lattejax.weights import autoencoders, pretrained

VOCABULARY = 400

# The tiny form of configs/digits.py, in transformers' terms.
OF_DIGITS = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[1, 2, 1]),
    vision_depth=1,
    vision_embed_dim=16,
    vision_mlp_ratio=4,
    vision_patch_size=2,
)


@functools.cache
def tokenizer() -> Tokenizer:
    return tokenizers.train(DigitSource("captions").texts(), VOCABULARY - 10)


def tiny_config(**changes: Any) -> Qwen2VLConfig:
    """A tiny geometry with changes, those of the vision tower named vision_…; `tied` ties embedding and head."""
    image, text_end, turn_end = tokenizer().convert_tokens_to_ids([IMAGE_PAD, TEXT_END, TURN_END])
    tied = changes.pop("tied", True)
    text = dict(
        hidden_size=48,
        intermediate_size=40,
        vocab_size=VOCABULARY,
        rms_norm_eps=1e-6,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[2, 2, 2]),
        bos_token_id=text_end,
        eos_token_id=turn_end,
        pad_token_id=text_end,
        tie_word_embeddings=tied,
    )
    vision = dict(embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2)
    for name, value in changes.items():
        (vision if name.startswith("vision_") else text)[name.removeprefix("vision_")] = value
    vision["hidden_size"] = text["hidden_size"]
    return Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, tie_word_embeddings=tied, eos_token_id=turn_end
    )


def random_model(config: Qwen2VLConfig, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def processor(config: Qwen2VLConfig, max_pixels: int = 2048) -> Qwen2VLImageProcessorPil:
    vision = config.vision_config
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        size={"shortest_edge": 64, "longest_edge": max_pixels},
    )


def save(
    model: Qwen2VLForConditionalGeneration, directory: Path, generation: dict[str, Any] | None = None, **options: Any
) -> Path:
    """Writes all files of a checkpoint on the hub; options are those of `save_pretrained`."""
    stops = list(tokenizer().convert_tokens_to_ids([TURN_END, TEXT_END]))
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=stops[1], **generation or {})
    model.save_pretrained(directory, **options)
    tokenizer().save_pretrained(directory)
    processor(model.config).save_pretrained(directory)
    return directory


def convert(model: Qwen2VLForConditionalGeneration, **options: Any) -> Path:
    """Saves and converts a model, in a directory that exists until the tests end."""
    directory = Path(tempfile.mkdtemp(dir=_directory()))
    pretrained.convert(str(save(model, directory / "checkpoint", **options)), directory / "converted")
    return directory / "converted"


# ---- Autoencoders

VIT = "EfficientViTBlock"
DC_AE = {
    "in-1.0": dict(
        encoder_block_types=("ResBlock", "ResBlock", VIT, VIT),
        decoder_block_types=("ResBlock", "ResBlock", VIT, VIT),
        encoder_block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32, 64),
        encoder_layers_per_block=(0, 2, 1, 1),
        decoder_layers_per_block=(0, 1, 2, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        decoder_norm_types=("batch_norm", "batch_norm", "rms_norm", "rms_norm"),
        decoder_act_fns=("relu", "relu", "silu", "silu"),
    ),
    "sana-1.0": dict(
        encoder_block_types=("ResBlock", "ResBlock", VIT),
        decoder_block_types=("ResBlock", "ResBlock", VIT),
        encoder_block_out_channels=(16, 32, 64),
        decoder_block_out_channels=(16, 32, 64),
        encoder_layers_per_block=(1, 1, 2),
        decoder_layers_per_block=(1, 2, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    ),
}


TAESD = dict(
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(8, 8, 8),
    num_encoder_blocks=(1, 2, 1),
    num_decoder_blocks=(2, 1, 1),
    latent_channels=5,
)


def random_autoencoder(family: str) -> AutoencoderDC | AutoencoderTiny:
    """A random autoencoder of one of DC_AE's families, or "TAESD"."""
    torch.manual_seed(0)
    if family == "TAESD":
        model = AutoencoderTiny(**TAESD)
    else:
        model = AutoencoderDC(latent_channels=8, attention_head_dim=8, **DC_AE[family])
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return model.eval()


@functools.cache
def convert_autoencoder(family: str = "in-1.0", scale: float | None = 0.25) -> Path:
    """Saves and converts an autoencoder, in a directory that exists until the tests end."""
    directory = Path(tempfile.mkdtemp(dir=_directory()))
    random_autoencoder(family).save_pretrained(directory / "checkpoint")
    autoencoders.convert(str(directory / "checkpoint"), directory / "converted", scale)
    return directory / "converted"


@functools.cache
def _directory() -> str:
    directory = tempfile.mkdtemp(prefix="lattejax-test-checkpoints-")
    atexit.register(shutil.rmtree, directory)
    return directory
