"""Pictures in colour from nothing: a small VLM learns to answer questions about coloured shapes, then a pathway to draw
them from their captions. docs/data.md makes the folder `shapes`, and walks through the commands.

The proportions are the flagship's: 64 image tokens, M-RoPE at theta 10⁶, 4 groups, and 3 layers in each. There is no
autoencoder: latents are pixels, 8×8 of them in a token, and the network predicts the clean ones.

python -m lattejax.train --config=configs/shapes.py --workdir=runs/shapes
"""

from ml_collections import ConfigDict

from lattejax import configuration

PROMPTS = (
    "a large red circle in the middle",
    "a small blue rectangle at the top left",
    "a large yellow triangle at the right",
    "a small green circle at the bottom",
    "a large black rectangle at the bottom right",
)
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
WORDS = {
    "size": ("small", "large"),
    "colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    "shape": ("circle", "rectangle", "triangle"),
    "place": ("middle", *ROWS, *COLUMNS, *(f"{row} {column}" for row in ROWS for column in COLUMNS)),
}


def get_config() -> ConfigDict:
    config = configuration.defaults()
    config.update(dtype="float32", log_every=50)

    # A small version of Qwen2-VL's geometry: 12 layers in 4 groups of 3.
    config.model.update(patch_size=8, prediction="x")
    config.model.text.update(vocab_size=512, hidden_size=128, intermediate_size=384, num_layers=12)
    config.model.text.update(num_heads=4, num_kv_heads=1, mrope_section=(4, 6, 6), rope_theta=1e6)
    config.model.vision.update(depth=4, embed_dim=128, num_heads=4, patch_size=8, hidden_size=128)
    config.tokenizer.vocab_size = 512

    config.images.update(source="folder", name="shapes", train="train[400:]", test="train[:400]")
    config.images.update(batch_size=64, shard_pictures=1000, most_unreadable=0, threads=2, unseen=UNSEEN)
    config.data.update(latents="latents/shapes", autoencoder="pixels", image_size=64, latent_shape=(64, 64, 3))
    config.data.update(prompt_length=28, answer_length=52)
    config.data.update(min_pixels=64 * 64, max_pixels=64 * 64)

    # At a learning rate of 1e-3 the VLM learns colours, and shapes hardly at all.
    config.pretrain.update(steps=800, batch_size=96, remat="none", unroll=True)
    config.pretrain.update(learning_rate=3e-4, adam_b2=0.99, warmup_steps=50, decay="cosine", ema_decay=0.98)
    config.train.update(steps=2000, batch_size=96, answer_batch_size=32, remat="none", unroll=True)
    config.train.update(learning_rate=1e-3, warmup_steps=200, decay="linear", ema_decay=0.995)

    config.eval.update(prompts=PROMPTS, every=500, examples=256, batch_size=50, images_per_prompt=8, guidance=3.0)
    words = {"type": "words", "words": WORDS, "prompts": 200}
    config.eval.evaluators.update(answers={"turn": "first"}, words=words | {"at": "training", "images": 200})
    config.eval.evaluators.final_words = words | {"at": "end", "images": 1000, "guidance": (1.0, 3.0, 5.0)}
    config.eval.evaluators.final_answers = {"type": "answers", "at": "end", "examples": 0, "turn": "first"}
    own = {"type": "asked", "at": "demand", "images": 200, "prompts": 200}
    config.eval.evaluators.self_consistency = own | {"question": "What is in the image?", "answer": "{prompt}"}
    config.checkpoint.update(every=500, keep=2, keep_every=0)
    return config
