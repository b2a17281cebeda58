"""One's own captioned pictures at 256 pixels, otherwise as configs/imagenet256.py: Qwen2-VL-2B frozen, K = 4, M = 7.

The folder `pictures` has name.jpg beside name.txt, or a metadata.jsonl with {"file_name": …, "text": …} a line. Before:

python -m lattejax.convert --source=Qwen/Qwen2-VL-2B-Instruct --out=weights/qwen2_vl_2b
python -m lattejax.convert --source=mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers --out=weights/dc_ae_sana
python -m lattejax.encode --config=configs/captions256.py --out=latents/captions256

Captions that are all different are read in every step. Where they repeat, 10,000 of them or fewer, share_contexts saves
that. To go on from a run on ImageNet, set train.init_from and pretrain.init_from to it, and data.autoencoder to its.
"""

from ml_collections import ConfigDict

PROMPTS = ("a red bicycle leaning against a white wall", "a bowl of soup on a wooden table, seen from above")


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.dtype = "bfloat16"
    config.log_every = 100
    config.most_skipped_steps = 100

    # Each group on a quarter of the devices, its state cut over four of those: any pod slice of 16 chips or more.
    config.mesh = ConfigDict()
    config.mesh.expert = 4
    config.mesh.data = -1
    config.mesh.fsdp = 4
    config.mesh.tensor = 1

    # Qwen2-VL-2B: 28 layers in 4 groups of 7.
    config.model = ConfigDict()
    config.model.variant = "couple"
    config.model.num_groups = 4
    config.model.group_sizes = ()
    config.model.interval_edges = ()
    config.model.residual_attention = "probabilities"
    config.model.residual_gate = "head"
    config.model.replica_init = "vlm"
    config.model.latent_position = "sincos"
    config.model.patch_size = 1

    config.model.text = ConfigDict()
    config.model.text.vocab_size = 151_936
    config.model.text.hidden_size = 1536
    config.model.text.intermediate_size = 8960
    config.model.text.num_layers = 28
    config.model.text.num_heads = 12
    config.model.text.num_kv_heads = 2
    config.model.text.rope_theta = 1_000_000.0
    config.model.text.mrope_section = (16, 24, 24)
    config.model.text.rms_norm_eps = 1e-6
    config.model.text.tie_word_embeddings = True

    config.model.vision = ConfigDict()
    config.model.vision.depth = 32
    config.model.vision.embed_dim = 1280
    config.model.vision.num_heads = 16
    config.model.vision.mlp_ratio = 4
    config.model.vision.patch_size = 14
    config.model.vision.temporal_patch_size = 2
    config.model.vision.spatial_merge_size = 2
    config.model.vision.in_channels = 3
    config.model.vision.hidden_size = 1536

    # What `lattejax.encode` turns into latents. The first 500 pictures of a fixed random order are held out.
    config.images = ConfigDict()
    config.images.source = "folder"
    config.images.name = "pictures"
    config.images.data_dir = ""
    config.images.train = "train[500:]"
    config.images.test = "train[:500]"
    config.images.image_key = ""
    config.images.caption_key = ""
    config.images.flip = False
    config.images.batch_size = 256
    config.images.shard_pictures = 10_000
    config.images.most_unreadable = 100
    config.images.threads = 16

    config.data = ConfigDict()
    config.data.source = "latents"
    config.data.latents = "latents/captions256"
    config.data.prompts = "captions"
    config.data.autoencoder = "weights/dc_ae_sana"
    config.data.image_size = 256
    config.data.latent_shape = (8, 8, 32)
    config.data.prompt_length = 128
    config.data.answer_length = 512
    config.data.min_pixels = 56 * 56
    config.data.max_pixels = 512 * 512
    config.data.threads = 1

    config.tokenizer = ConfigDict()
    config.tokenizer.path = ""
    config.tokenizer.vocab_size = 384

    # The VLM is taken as it comes: no steps, and nothing else here is used.
    config.pretrain = ConfigDict()
    config.pretrain.init_from = "weights/qwen2_vl_2b"
    config.pretrain.steps = 0
    config.pretrain.batch_size = 1
    config.pretrain.accumulation = 1
    config.pretrain.learning_rate = 1e-5
    config.pretrain.warmup_steps = 0
    config.pretrain.decay = "none"
    config.pretrain.adam_b1 = 0.9
    config.pretrain.adam_b2 = 0.95
    config.pretrain.weight_decay = 0.0
    config.pretrain.clip_norm = 1.0
    config.pretrain.ema_decay = 0.0
    config.pretrain.remat = "none"
    config.pretrain.unroll = False

    # The generation pathway. Learning rate, betas, clipping, EMA and density are ours: the paper does not state them.
    config.train = ConfigDict()
    config.train.init_from = ""
    config.train.steps = 100_000
    config.train.batch_size = 1024
    config.train.accumulation = 1
    config.train.learning_rate = 2e-4
    config.train.warmup_steps = 5_000
    config.train.decay = "none"
    config.train.adam_b1 = 0.9
    config.train.adam_b2 = 0.95
    config.train.weight_decay = 0.0
    config.train.clip_norm = 1.0
    config.train.ema_decay = 0.9999
    config.train.remat = "dots"
    config.train.unroll = False
    config.train.prompt_dropout = 0.1
    config.train.share_contexts = False
    config.train.density = "uniform"
    config.train.density_mean = 0.0
    config.train.density_std = 1.0
    config.train.density_shift = 1.0
    config.train.stratified = True
    config.train.answer_batch_size = 256
    config.train.answer_weight = 1.0

    config.eval = ConfigDict()
    config.eval.every = 5_000
    config.eval.examples = 512
    config.eval.prompts = PROMPTS
    config.eval.images_per_prompt = 8
    config.eval.sample_steps = 40
    config.eval.guidance = 5.0
    config.eval.guidance_interval = (0.0, 1.0)
    config.eval.solver = "euler"
    config.eval.shift = 1.0
    config.eval.batch_size = 64
    config.eval.scored_images = 0
    config.eval.final_images = 0

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 2_000
    config.checkpoint.keep = 3
    config.checkpoint.keep_every = 20_000

    config.profile = ConfigDict()
    config.profile.start = 100
    config.profile.steps = 0
    return config
