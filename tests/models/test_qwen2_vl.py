"""Both towers against transformers' Qwen2-VL, float32, random weights; and decoding against reading whole prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from lattejax.models import qwen2_vl, vision
from lattejax.models.qwen2_vl import Prompts, VLMConfig
from lattejax.models.rotary import patch_positions, token_positions
from lattejax.models.text import TextConfig
from lattejax.models.vision import Images, VisionConfig

IMAGE, VOCABULARY = 99, 100
forward = jax.jit(qwen2_vl.forward, static_argnames="config")
# Float32 on both sides, summed in different orders: errors of about 1e-6 relative grow through the layers.
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


def models(tied: bool, kv_heads: int) -> tuple[VLMConfig, dict, torch.nn.Module]:
    text = dict(hidden_size=48, intermediate_size=40, vocab_size=VOCABULARY, rms_norm_eps=1e-6)
    towers = dict(embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2, hidden_size=48)
    config = Qwen2VLConfig(
        text_config=text
        | dict(
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            rope_parameters=dict(rope_type="default", rope_theta=10_000.0, mrope_section=[2, 2, 2]),
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=tied,
        ),
        vision_config=towers,
        image_token_id=IMAGE,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    theirs = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # away from zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = VLMConfig(
        TextConfig(
            **text,
            num_layers=3,
            num_heads=4,
            num_kv_heads=kv_heads,
            rope_theta=10_000.0,
            mrope_section=(2, 2, 2),
            tie_word_embeddings=tied,
        ),
        VisionConfig(**towers),
    )
    return ours, from_torch(ours, theirs), theirs


def from_torch(config: VLMConfig, module: torch.nn.Module) -> dict:
    """transformers' weights in our tree."""
    state = {name: value.detach().numpy() for name, value in module.state_dict().items()}

    def dense(name):
        out = {"kernel": state[f"{name}.weight"].reshape(state[f"{name}.weight"].shape[0], -1).T}
        return out | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})

    def norm(name):
        out = {"scale": state[f"{name}.weight"]}
        return out | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})

    def decoder(i):
        at = f"model.language_model.layers.{i}."
        return {
            "input_norm": norm(at + "input_layernorm"),
            "attention": {name: dense(f"{at}self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
            "post_attention_norm": norm(at + "post_attention_layernorm"),
            "mlp": {name: dense(f"{at}mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")},
        }

    def block(i):
        at = f"model.visual.blocks.{i}."
        return {
            "norm1": norm(at + "norm1"),
            "attention": {"qkv": dense(at + "attn.qkv"), "proj": dense(at + "attn.proj")},
            "norm2": norm(at + "norm2"),
            "fc1": dense(at + "mlp.fc1"),
            "fc2": dense(at + "mlp.fc2"),
        }

    def stack(trees):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    merger = "model.visual.merger."
    vocabulary = {
        "embedding": state["model.language_model.embed_tokens.weight"],
        "final_norm": norm("model.language_model.norm"),
    }
    if not config.text.tie_word_embeddings:
        vocabulary["lm_head"] = dense("lm_head")
    return {
        "text": {"vocabulary": vocabulary, "layers": stack([decoder(i) for i in range(config.text.num_layers)])},
        "vision": {
            "patch_embedding": {"proj": dense("model.visual.patch_embed.proj")},
            "blocks": stack([block(i) for i in range(config.vision.depth)]),
            "merger": {
                "norm": norm(merger + "ln_q"),
                "fc1": dense(merger + "mlp.0"),
                "fc2": dense(merger + "mlp.2"),
            },
        },
    }


def prompt_of(parts: list, seed: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Token ids from a list of text lengths and image grids."""
    rng, ids, grids = np.random.default_rng(seed), [], []
    for part in parts:
        if isinstance(part, int):
            ids.extend(rng.integers(3, IMAGE - 1, part))
        else:
            ids.extend([IMAGE] * (part[0] * part[1] // 4))
            grids.append((1, *part))
    return np.array(ids), grids


CASES = {
    "text only": [[7]],
    "one image": [[3, (4, 4), 2]],
    "odd aspect, batch of one": [[1, (2, 10), 5]],
    "several images": [[2, (4, 6), 1, (6, 2), 3]],
    "padded batch": [[4, (4, 4), 3], [9], [2, (2, 2), 2, (8, 4), 1]],
}


def batches(config: VLMConfig, rows: list[list]) -> tuple[Prompts, dict]:
    """One batch, right-padded, in our form and in transformers'."""
    rng = np.random.default_rng(0)
    prompts = [prompt_of(parts, seed) for seed, parts in enumerate(rows)]
    length = max(len(ids) for ids, _ in prompts)
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    positions = np.zeros((len(rows), 3, length), np.int32)
    for row, (tokens, grids) in enumerate(prompts):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        positions[row, :, : len(tokens)] = token_positions(tokens, grids, IMAGE, config.vision.spatial_merge_size)
    theirs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
    all_grids = [grid for _, grids in prompts for grid in grids]
    images = None
    if all_grids:
        pixels = [
            rng.standard_normal((grid[1] * grid[2], config.vision.patch_dim)).astype(np.float32) for grid in all_grids
        ]
        theirs |= {
            "pixel_values": torch.tensor(np.concatenate(pixels)),
            "image_grid_thw": torch.tensor(all_grids),
            "mm_token_type_ids": torch.tensor((ids == IMAGE).astype(np.int64)),
        }
        images = our_images(prompts, pixels, ids, config.vision)
    return Prompts(ids, mask, positions, images), theirs


def our_images(prompts, pixels, ids, config: VisionConfig) -> Images:
    most, longest = max(len(grids) for _, grids in prompts), max(len(patches) for patches in pixels)
    shape, index = (len(prompts), most, longest), np.full(ids.shape, -1, np.int32)
    patches = np.zeros((*shape, config.patch_dim), np.float32)
    positions, mask, left = np.zeros((*shape, 2), np.int32), np.zeros(shape, bool), iter(pixels)
    for row, (_, grids) in enumerate(prompts):
        places = []
        for i, grid in enumerate(grids):
            count = grid[1] * grid[2]
            patches[row, i, :count], mask[row, i, :count] = next(left), True
            positions[row, i, :count] = patch_positions(grid, config.spatial_merge_size)
            places.extend(i * longest // 4 + np.arange(count // 4))
        index[row, ids[row] == IMAGE] = places
    return Images(patches, positions, mask, index)


@pytest.mark.parametrize("tied, kv_heads", [(True, 2), (False, 4)])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_and_the_logits_equal_transformers(case, tied, kv_heads):
    config, params, module = models(tied, kv_heads)
    prompts, theirs = batches(config, CASES[case])
    with torch.no_grad():
        expected = module(**theirs, output_hidden_states=True)
        their_positions, _ = module.model.get_rope_index(
            theirs["input_ids"],
            mm_token_type_ids=theirs.get("mm_token_type_ids", torch.zeros_like(theirs["input_ids"])),
            image_grid_thw=theirs.get("image_grid_thw"),
            attention_mask=theirs["attention_mask"],
        )
    real = prompts.mask
    np.testing.assert_array_equal(
        prompts.position_ids.swapaxes(0, 1)[:, real], their_positions.numpy()[:, real], "position ids"
    )
    if prompts.images is not None:
        features = np.asarray(vision.encode(config.vision, params["vision"], prompts.images))
        used = prompts.images.mask[:, :, ::4]
        their_features = module.model.visual(theirs["pixel_values"], theirs["image_grid_thw"]).pooler_output
        np.testing.assert_allclose(features[used], their_features.detach(), **TOLERANCE)
    hidden, cache = forward(config, params, prompts)
    logits = qwen2_vl.logits(config, params, hidden)
    np.testing.assert_allclose(logits[real], expected.logits.numpy()[real], **TOLERANCE)
    for layer in range(config.text.num_layers):
        their_cache = expected.past_key_values.layers[layer]
        keys, values = their_cache.keys, their_cache.values
        np.testing.assert_allclose(cache.keys[layer][real], keys.numpy().swapaxes(1, 2)[real], **TOLERANCE)
        np.testing.assert_allclose(cache.values[layer][real], values.numpy().swapaxes(1, 2)[real], **TOLERANCE)


@pytest.mark.parametrize("stacked", [True, False])
def test_decoding_token_by_token_equals_reading_the_whole(stacked):
    """Rows of different lengths, so that cache slots and positions differ."""
    config, params, _ = models(True, 2)
    prompts, _ = batches(config, CASES["padded batch"])
    params = params if stacked else qwen2_vl.unstack(params)
    lengths, count = prompts.mask.sum(axis=1), 4
    answers = np.random.default_rng(1).integers(3, IMAGE - 1, (len(lengths), count)).astype(np.int32)

    # The prompts with their answers, read at once: causal, so that its logits hold for every shorter one too.
    ids, mask, positions, index = (
        np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)])
        for x in (prompts.input_ids, prompts.mask, prompts.position_ids, prompts.images.index + 1)
    )
    for row, length in enumerate(lengths):
        answered = slice(length, length + count)
        ids[row, answered], mask[row, answered], index[row, length:] = answers[row], True, 0
        positions[row, :, answered] = positions[row, :, :length].max() + 1 + np.arange(count)
    hidden, _ = forward(config, params, Prompts(ids, mask, positions, prompts.images._replace(index=index - 1)))
    expected = np.asarray(qwen2_vl.logits(config, params, hidden))

    decode_token = jax.jit(qwen2_vl.decode_token, static_argnames="config")
    logits, state = qwen2_vl.prefill(config, params, prompts, capacity=count)
    for step in range(count + 1):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row], expected[row, length - 1 + step], **TOLERANCE)
        if step < count:
            logits, state = decode_token(config, params, state, jnp.asarray(answers[:, step]))


def test_towers_of_different_width_are_refused():
    with pytest.raises(ValueError, match=r"vision\.hidden_size=8 must equal text\.hidden_size=1536"):
        VLMConfig(TextConfig(), VisionConfig(hidden_size=8))


def test_image_tokens_that_do_not_match_the_grids_are_refused():
    for ids, grids in [([IMAGE] * 3, [(1, 4, 4)]), ([IMAGE] * 4, []), ([5], [(1, 4, 4)]), ([IMAGE] * 5, [(1, 4, 4)])]:
        with pytest.raises(ValueError, match="do not match the image grids"):
            token_positions(np.array(ids), grids, IMAGE, 2)
