"""Pictures in colour from nothing: a small VLM learns to answer questions about coloured shapes, then a pathway to draw
them from their captions. docs/coloured-shapes.md has the commands. In the proportions of the paper's setting: 64 image
tokens, M-RoPE at theta 10⁶, 4 groups, here of 3 layers. Latents are pixels, 8×8 of them in a token.

python -m lattejax.train --config=configs/shapes.py --workdir=runs/shapes
python -m lattejax.train --config=configs/shapes.py:long --workdir=runs/shapes_long
"""

from ml_collections import ConfigDict

from lattejax import configuration

PROMPTS = (
    "a large red circle in the middle",
    "a small blue triangle at the top left",
    "a large yellow triangle at the right",
    "a small green rectangle at the bottom",
    "a large black rectangle at the bottom right",
)
# Pairs of shape and colour that the pathway never trains on. The VLM's questions have them.
UNSEEN = "red triangle|green circle|blue rectangle|black triangle"
WORDS = {
    "size": ("small", "large"),
    "colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    "shape": ("circle", "rectangle", "triangle"),
    "place": ("middle", "top", "bottom", "left", "right", "top left", "top right", "bottom left", "bottom right"),
}


def get_config(length: str = "short") -> ConfigDict:
    config = configuration.defaults()
    config.update(dtype="float32", log_every=50)
    config.pretrain.steps, config.train.steps = {"short": (800, 2000), "long": (1600, 12_000)}[length]
    # Intervals are short near the noise, and all groups train and draw equally often. Equal ones do as well.
    config.model.update(patch_size=8, prediction="x", interval_edges=(0.0, 0.1, 0.25, 0.5, 1.0))
    config.model.text.update(vocab_size=512, hidden_size=128, intermediate_size=384, num_layers=12)
    config.model.text.update(num_heads=4, num_kv_heads=1, mrope_section=(4, 6, 6), rope_theta=1e6)
    config.model.vision.update(depth=4, embed_dim=128, num_heads=4, patch_size=8, hidden_size=128)
    config.tokenizer.vocab_size = 512

    config.images.update(source="folder", name="shapes", train="train[400:]", test="train[:400]")
    config.images.update(batch_size=64, shard_pictures=1000, most_unreadable=0, threads=2)
    config.data.update(latents="latents/shapes", autoencoder="pixels", image_size=64, latent_shape=(64, 64, 3))
    config.data.update(prompt_length=28, answer_length=52, min_pixels=4096, max_pixels=4096, unseen=UNSEEN)
    config.pretrain.update(batch_size=96, warmup_steps=50, decay="cosine", ema_decay=0.98, unroll=True)
    config.pretrain.update(learning_rate=3e-4, adam_b2=0.99)
    config.train.update(batch_size=96, warmup_steps=200, decay="linear", ema_decay=0.995, unroll=True)
    config.train.update(learning_rate=2e-3, remat="none", density="shifted", density_shift=1 / 3, answer_batch_size=32)

    config.eval.update(prompts=PROMPTS, every=500, examples=256, batch_size=50, guidance=3.0, shift=1 / 3)
    words = {"type": "words", "words": WORDS, "prompts": 100, "matching": f"^(?!.*({UNSEEN}))"}
    unseen = words | {"prompts": 25, "matching": UNSEEN, "prefix": "unseen_"}
    own = {"question": "What is in the image?", "answer": "{prompt}", "images": 200, "prompts": 200}
    scores = config.eval.evaluators
    scores.update(answers={"at": "training"}, final_answers={"type": "answers", "at": "end", "examples": 0})
    scores.update(words=words | {"images": 200}, final_unseen=unseen | {"at": "end", "images": 1000})
    scores.final_words = words | {"at": "end", "images": 1000, "guidance": (1.0, 3.0, 5.0)}
    scores.self_consistency = own | {"type": "asked", "at": "demand"}
    config.checkpoint.update(every=500, keep=2, keep_every=0)
    return config
