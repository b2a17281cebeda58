"""A miniature of configs/shapes.py: half of the pictures' side, two groups of two layers, a VLM that knows nothing, and
large shapes alone."""

from ml_collections import ConfigDict

from lattejax.experiments import shapes


def get_config() -> ConfigDict:
    config = shapes.get_config()
    config.images.update(train="train[200:900]", test="train[:200]")
    config.data.update(image_size=32, latent_shape=(32, 32, 3), unseen="small")
    config.model.update(num_groups=2, interval_edges=(0.0, 0.25, 1.0))
    config.model.text.update(hidden_size=64, intermediate_size=128, num_layers=4, mrope_section=(2, 3, 3))
    config.model.vision.update(depth=1, embed_dim=32, num_heads=2, hidden_size=64)
    config.pretrain.steps = 0
    config.train.update(steps=800, batch_size=64, warmup_steps=20, ema_decay=0.98, learning_rate=4e-3, unroll=False)
    config.eval.update(every=400, examples=64, sample_steps=12)
    words = config.eval.evaluators.words.to_dict()
    words.update(at="end", images=60, prompts=60, matching="large")
    config.eval.evaluators = {"held_out_loss": {"at": "training"}, "words": words}
    return config
