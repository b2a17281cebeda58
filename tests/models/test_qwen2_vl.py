"""Both towers and greedy decoding against transformers' Qwen2-VL, float32, on checkpoints that transformers wrote."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from lattejax.data.prompts import EncodedPrompt
from lattejax.models import functional, qwen2_vl, text, vision
from lattejax.models.qwen2_vl import Prompts, VLMConfig
from lattejax.models.rotary import token_positions
from lattejax.models.text import TextConfig, Vocabulary
from lattejax.models.vision import VisionConfig
from lattejax.sampling.answers import Answerer, Decoding
from lattejax.weights.pretrained import Pretrained
from tests import checkpoints

# Float32 on both sides, summed in different orders: errors of about 1e-6 relative grow through the layers.
TOLERANCE = dict(rtol=1e-4, atol=1e-4)

# Geometries with different heads, and with tied or untied embeddings.
MODELS = {
    "tied, grouped heads": dict(tied=True, num_key_value_heads=2),
    "untied, ungrouped heads": dict(tied=False, num_key_value_heads=4),
    "untied, one KV head, uneven sections, no merging": dict(
        tied=False, num_key_value_heads=1, vision_spatial_merge_size=1, hidden_size=40, num_attention_heads=2,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 5]),
    ),
}  # fmt: skip

# The prompts of a batch: each question, and the sizes of the images before it.
BATCHES = {
    "text only": [("Which digit is this?", [])],
    "one image": [("What?", [(24, 24)])],
    "odd aspect, batch of one": [("Is this number even or odd?", [(9, 90)])],
    "several images": [("Is this a seven?", [(16, 24), (31, 17), (8, 8)])],
    "padded batch": [("Which digit is this?", [(16, 16)]), ("Is this a three?", []), ("a", [(8, 8), (40, 20)])],
}

GROUPED, UNGROUPED, ONE = MODELS
OFTEN = [
    *((batch, GROUPED) for batch in ("text only", "odd aspect, batch of one", "padded batch")),
    ("padded batch", UNGROUPED),
    ("several images", ONE),
]
SHAPES = [
    *OFTEN,
    *(
        pytest.param(batch, model, marks=pytest.mark.slow)
        for model in MODELS
        for batch in BATCHES
        if (batch, model) not in OFTEN
    ),
]


@functools.cache
def opened(model: str) -> tuple[torch.nn.Module, Answerer, dict]:
    """transformers' model; our model, converted from its files; and our weights, stacked."""
    theirs = checkpoints.random_model(checkpoints.tiny_config(**MODELS[model]))
    converted = Pretrained.open(checkpoints.convert(theirs))
    params = converted.params("float32")
    return theirs, Answerer(converted.vlm_config, qwen2_vl.unstack(params), converted.encoder), params


def encoded(answerer: Answerer, batch: str) -> list[EncodedPrompt]:
    def picture(size):
        return Image.fromarray(np.random.default_rng(size).integers(0, 255, (*size, 3)).astype(np.uint8))

    encoder = answerer.encoder
    return [
        encoder.question(question, [encoder.read_image(picture(size)) for size in sizes])
        for question, sizes in BATCHES[batch]
    ]


def for_transformers(prompts: list[EncodedPrompt], image_token: int) -> dict:
    """One batch, right-padded."""
    length = max(len(prompt.input_ids) for prompt in prompts)
    ids = np.stack([np.pad(prompt.input_ids, (0, length - len(prompt.input_ids))) for prompt in prompts])
    mask = np.stack([np.arange(length) < len(prompt.input_ids) for prompt in prompts])
    images = [image for prompt in prompts for image in prompt.images]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask).long()}
    inputs["mm_token_type_ids"] = torch.tensor((ids == image_token) & mask).int()
    if images:
        inputs["pixel_values"] = torch.tensor(np.concatenate([image.patches for image in images]))
        inputs["image_grid_thw"] = torch.tensor([image.grid for image in images])
    return inputs


@functools.partial(jax.jit, static_argnames="config")
def hidden_states(config: VLMConfig, params: dict, prompts: Prompts) -> list[jax.Array]:
    """The inputs of each layer, and the output of the last."""
    vocabulary = functional.bind(Vocabulary, config.text, params=params["text"]["vocabulary"])
    x = vocabulary.embed(prompts.input_ids)
    if prompts.images is not None:
        x = vision.place(x, vision.encode(config.vision, params["vision"], prompts.images), prompts.images.index)
    mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool)) & prompts.mask[:, None]
    states = [x]
    for layer in params["text"]["layers"]:
        states.append(text.decode(config.text, [layer], states[-1], prompts.position_ids, mask)[0])
    return states


@pytest.mark.parametrize("batch, model", SHAPES)
def test_everything_equals_transformers(batch, model):
    theirs, ours, stacked = opened(model)
    config, encoder = ours.config, ours.encoder
    prompts = encoded(ours, batch)
    inputs = for_transformers(prompts, encoder.image_token)
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True)
        positions, _ = theirs.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=inputs["attention_mask"],
        )
    padded = encoder.batch(prompts)
    real = padded.mask
    np.testing.assert_array_equal(padded.position_ids.swapaxes(0, 1)[:, real], positions.numpy()[:, real])
    if padded.images is not None:
        features = np.asarray(vision.encode(config.vision, stacked["vision"], jax.tree.map(jnp.asarray, padded.images)))
        with torch.no_grad():
            their_features = theirs.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        used = padded.images.mask[:, :, :: encoder.merge**2]
        np.testing.assert_allclose(features[used], their_features, **TOLERANCE)

    states = hidden_states(config, ours.params, padded)
    for layer, (state, their_state) in enumerate(zip(states[:-1], expected.hidden_states[:-1], strict=True)):
        np.testing.assert_allclose(state[real], their_state.numpy()[real], **TOLERANCE, err_msg=f"into layer {layer}")
    final_norm = functional.bind(Vocabulary, config.text, params=ours.params["text"]["vocabulary"]).final_norm
    np.testing.assert_allclose(final_norm(states[-1])[real], expected.hidden_states[-1].numpy()[real], **TOLERANCE)

    # The same with a scan over stacked layers, including the caches.
    hidden, cache = jax.jit(qwen2_vl.forward, static_argnames="config")(config, stacked, padded)
    logits = qwen2_vl.logits(config, stacked, hidden)
    np.testing.assert_allclose(logits[real], expected.logits.numpy()[real], **TOLERANCE)
    for layer, theirs_of_layer in enumerate(expected.past_key_values.layers):
        for mine, other in ((cache.keys, theirs_of_layer.keys), (cache.values, theirs_of_layer.values)):
            np.testing.assert_allclose(mine[layer][real], other.numpy().swapaxes(1, 2)[real], **TOLERANCE)


@pytest.mark.parametrize("batch, model", SHAPES)
def test_64_greedy_tokens_equal_those_of_transformers(batch, model, monkeypatch):
    """Ours as one padded batch, theirs row by row."""
    theirs, ours, _ = opened(model)
    monkeypatch.setattr(ours.encoder, "stop_tokens", (-1,))
    prompts = encoded(ours, batch)
    said = np.stack(list(ours.tokens(ours.encoder.batch(prompts), Decoding(max_tokens=64))), axis=1)
    theirs.generation_config.eos_token_id = None
    for row, prompt in enumerate(prompts):
        inputs = for_transformers([prompt], ours.encoder.image_token)
        expected = theirs.generate(**inputs, max_new_tokens=64, do_sample=False)[0, len(prompt.input_ids) :]
        assert said[row].tolist() == expected.tolist()


def test_the_checkpoints_repetition_penalty_works_as_in_transformers(caplog):
    """Greedy and padded, for prompts with images, whose pads count as read; unsupported settings cause a warning."""
    theirs = checkpoints.random_model(checkpoints.tiny_config(**MODELS[GROUPED]))
    wanted = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3}
    ours = Answerer.load(checkpoints.convert(theirs, generation=wanted), "float32")
    assert "no_repeat_ngram_size" in caplog.text and "repetition_penalty" not in caplog.text
    ours.encoder.stop_tokens = (-1,)
    prompts = encoded(ours, "padded batch")
    said = np.stack(list(ours.tokens(ours.encoder.batch(prompts), Decoding(max_tokens=24))), axis=1)
    theirs.generation_config.update(eos_token_id=None, no_repeat_ngram_size=None)
    for row, prompt in enumerate(prompts):
        inputs = for_transformers([prompt], ours.encoder.image_token)
        expected = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)[0, len(prompt.input_ids) :]
        assert said[row].tolist() == expected.tolist()
    ours.repetition_penalty = 1.0
    assert np.any(said != np.stack(list(ours.tokens(ours.encoder.batch(prompts), Decoding(max_tokens=24))), axis=1))


@pytest.mark.parametrize("stacked", [True, False])
def test_decoding_token_by_token_equals_reading_the_complete_text(stacked):
    """Rows of different lengths, so that cache slots and positions differ."""
    _, answerer, stacked_params = opened(GROUPED)
    config, params = answerer.config, stacked_params if stacked else answerer.params
    prompts = answerer.encoder.batch(encoded(answerer, "padded batch"))
    lengths, count = prompts.mask.sum(axis=1), 4
    answers = np.random.default_rng(1).integers(20, 380, (len(lengths), count)).astype(np.int32)

    # The prompts with their answers, read at once: causal, so the logits hold for every shorter prefix too.
    ids, mask, positions, index = (
        np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count)])
        for x in (prompts.input_ids, prompts.mask, prompts.position_ids, prompts.images.index + 1)
    )
    for row, length in enumerate(lengths):
        answered = slice(length, length + count)
        ids[row, answered], mask[row, answered], index[row, length:] = answers[row], True, 0
        positions[row, :, answered] = positions[row, :, :length].max() + 1 + np.arange(count)
    forward = jax.jit(qwen2_vl.forward, static_argnames="config")
    hidden, _ = forward(config, params, Prompts(ids, mask, positions, prompts.images._replace(index=index - 1)))
    expected = np.asarray(qwen2_vl.logits(config, params, hidden))

    decode_token = jax.jit(qwen2_vl.decode_token, static_argnames="config")
    logits, state = qwen2_vl.prefill(config, params, jax.tree.map(jnp.asarray, prompts), capacity=count)
    for step in range(count + 1):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row], expected[row, length - 1 + step], **TOLERANCE)
        if step < count:
            logits, state = decode_token(config, params, state, jnp.asarray(answers[:, step]))


def test_towers_of_different_width_are_refused():
    with pytest.raises(ValueError, match=r"vision\.hidden_size=8 must equal text\.hidden_size=1536"):
        VLMConfig(TextConfig(), VisionConfig(hidden_size=8))


IMAGE = 99


def test_image_tokens_that_do_not_match_the_grids_are_refused():
    for ids, grids in [([IMAGE] * 3, [(1, 4, 4)]), ([IMAGE] * 4, []), ([5], [(1, 4, 4)]), ([IMAGE] * 5, [(1, 4, 4)])]:
        with pytest.raises(ValueError, match="do not match the image grids"):
            token_positions(np.array(ids), grids, IMAGE, 2)
