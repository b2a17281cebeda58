"""Your own captioned pictures at 256 pixels, otherwise as configs/imagenet256.py: Qwen2-VL-2B frozen, K = 4, M = 7.

The folder `pictures` has name.jpg beside name.txt, or a metadata.jsonl with one {"file_name": …, "text": …} per line.
First run:

python -m lattejax.convert --source=Qwen/Qwen2-VL-2B-Instruct --out=weights/qwen2_vl_2b
python -m lattejax.convert --source=mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers --out=weights/dc_ae_sana
python -m lattejax.encode --config=configs/captions256.py --out=latents/captions256

Contexts of captions are computed in every step. If captions repeat (at most 10,000 distinct ones), share_contexts saves
that. To start from a run on ImageNet, set data.autoencoder to its autoencoder before encoding, and train.init_from and
pretrain.init_from to the run.
"""

from ml_collections import ConfigDict

from lattejax import configuration


def get_config() -> ConfigDict:
    config = configuration.defaults()  # Qwen2-VL-2B: 28 layers in 4 groups of 7

    # Each group on a quarter of the devices, its state sharded over four of them: any pod slice of 16 chips or more.
    config.mesh.update(expert=4, fsdp=4)

    # The pictures for `lattejax.encode`. The first 500 of a fixed random order are held out.
    config.images.update(source="folder", name="pictures", train="train[500:]", test="train[:500]")
    config.data.update(latents="latents/captions256", autoencoder="weights/dc_ae_sana", prompt_length=128)

    # The VLM is used unchanged: no steps.
    config.pretrain.init_from = "weights/qwen2_vl_2b"
    config.train.update(steps=100_000, batch_size=1024, share_contexts=False)
    config.eval.every = 5_000
    return config
