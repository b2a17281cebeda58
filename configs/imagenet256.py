"""The paper's setting: ImageNet at 256 pixels with class names as prompts, Qwen2-VL-2B frozen, K = 4, M = 7.

The latents are 8×8×32, DC-AE's; 240,000 steps of 2,048 images. Before it:

python -m lattejax.convert --source=Qwen/Qwen2-VL-2B-Instruct --out=weights/qwen2_vl_2b
python -m lattejax.convert --source=mit-han-lab/dc-ae-f32c32-in-1.0-diffusers --scale=0.3189 --out=weights/dc_ae_in
pip install tensorflow && tfds build imagenet2012 --file_format=array_record
python -m lattejax.encode --config=configs/imagenet256.py --out=latents/imagenet256
"""

from ml_collections import ConfigDict

CLASSES = ("goldfish", "Golden Retriever", "red panda", "volcano", "cheeseburger", "sports car", "daisy", "castle")


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

    # What `lattejax.encode` turns into latents: each picture once, as it is.
    config.images = ConfigDict()
    config.images.source = "tfds"
    config.images.name = "imagenet2012"
    config.images.data_dir = ""
    config.images.train = "train"
    config.images.test = "validation"
    config.images.image_key = "image"
    config.images.caption_key = "label"
    config.images.flip = False
    config.images.batch_size = 256
    config.images.shard_pictures = 10_000
    config.images.most_unreadable = 100
    config.images.threads = 16

    config.data = ConfigDict()
    config.data.source = "latents"
    config.data.latents = "latents/imagenet256"
    config.data.prompts = "captions"
    config.data.autoencoder = "weights/dc_ae_in"
    config.data.image_size = 256
    config.data.latent_shape = (8, 8, 32)
    config.data.prompt_length = 40
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
    config.train.steps = 240_000
    config.train.batch_size = 2048
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
    config.train.share_contexts = True
    config.train.density = "uniform"
    config.train.density_mean = 0.0
    config.train.density_std = 1.0
    config.train.density_shift = 1.0
    config.train.stratified = True
    config.train.answer_batch_size = 256
    config.train.answer_weight = 1.0

    config.eval = ConfigDict()
    config.eval.every = 10_000
    config.eval.examples = 512
    config.eval.prompts = CLASSES
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
