"""Pictures in colour from nothing: a small VLM learns to answer questions about coloured shapes, then a pathway to draw
them from their captions. docs/data.md makes the folder `shapes`; 64×64 pictures, read and drawn at 32×32.

There is no autoencoder: latents are pixels, 4×4 of them in a token, and the network predicts the clean ones.

python -m lattejax.encode --config=configs/shapes.py --out=latents/shapes
python -m lattejax.train --config=configs/shapes.py --workdir=runs/shapes
"""

from ml_collections import ConfigDict

from lattejax import configuration

PROMPTS = ("a red circle", "a blue rectangle", "a yellow triangle", "a green circle", "a black rectangle")


def get_config() -> ConfigDict:
    config = configuration.defaults()
    config.dtype = "float32"
    config.log_every = 50

    # A small version of Qwen2-VL's geometry: 8 layers in 4 groups of 2.
    config.model.update(patch_size=4, prediction="x")
    config.model.text.update(vocab_size=512, hidden_size=128, intermediate_size=256, num_layers=8)
    config.model.text.update(num_heads=4, num_kv_heads=1, mrope_section=(4, 6, 6), rope_theta=10_000.0)
    config.model.vision.update(depth=2, embed_dim=64, num_heads=2, patch_size=4, hidden_size=128)
    config.tokenizer.vocab_size = 512

    config.images.update(source="folder", name="shapes", train="train[300:]", test="train[:300]")
    config.images.update(batch_size=64, shard_pictures=1000, most_unreadable=0, threads=2)
    config.data.update(latents="latents/shapes", autoencoder="pixels", image_size=32, latent_shape=(32, 32, 3))
    config.data.update(prompt_length=32, answer_length=64, min_pixels=32 * 32, max_pixels=32 * 32)

    config.pretrain.update(
        steps=600, batch_size=48, learning_rate=2e-3, warmup_steps=50, decay="linear", ema_decay=0.95
    )
    config.train.update(steps=2000, batch_size=64, remat="none", unroll=True, answer_batch_size=32)
    config.train.update(learning_rate=2e-3, warmup_steps=100, decay="linear", ema_decay=0.99)

    config.eval.prompts = PROMPTS
    config.eval.update(every=1000, examples=256, batch_size=64, images_per_prompt=8, guidance=3.0)
    config.eval.evaluators.final_answers = {"type": "answers", "at": "end", "examples": 1000}
    config.checkpoint.update(every=500, keep=2, keep_every=0)
    return config
