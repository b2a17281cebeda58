"""The paper's setting: ImageNet at 256 pixels with class names as prompts, Qwen2-VL-2B frozen, K = 4, M = 7.

The latents are DC-AE's, 8×8×32; 240,000 steps of 2,048 images. First run:

python -m lattejax.convert --source=Qwen/Qwen2-VL-2B-Instruct --out=weights/qwen2_vl_2b
python -m lattejax.convert --source=mit-han-lab/dc-ae-f32c32-in-1.0-diffusers --scale=0.3189 --out=weights/dc_ae_in
pip install tensorflow && tfds build imagenet2012 --file_format=array_record
python -m lattejax.encode --config=configs/imagenet256.py --out=latents/imagenet256
"""

from ml_collections import ConfigDict

from lattejax import configuration

CLASSES = ("goldfish", "Golden Retriever", "red panda", "volcano", "cheeseburger", "sports car", "daisy", "castle")


def get_config() -> ConfigDict:
    config = configuration.defaults()  # Qwen2-VL-2B: 28 layers in 4 groups of 7

    # Each group on a quarter of the devices, its state sharded over four of them: any pod slice of 16 chips or more.
    config.mesh.update(expert=4, fsdp=4)

    # The pictures for `lattejax.encode`: each picture once, not mirrored.
    config.images.update(source="tfds", name="imagenet2012", image_key="image", caption_key="label")
    config.images.update(train="train", test="validation")
    config.data.update(latents="latents/imagenet256", autoencoder="weights/dc_ae_in", prompt_length=40)

    # The VLM is used unchanged: no steps.
    config.pretrain.init_from = "weights/qwen2_vl_2b"
    config.eval.prompts = CLASSES
    return config
