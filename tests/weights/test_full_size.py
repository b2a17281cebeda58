"""Qwen2-VL-2B's real geometry, random weights: memory of the conversion, and logits of a photo. Minutes, and 20 GiB."""

import gc
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from lattejax.models import qwen2_vl
from lattejax.sampling.answers import Answerer, Decoding
from tests import checkpoints
from tests.helpers import ENVIRONMENT, ROOT

GIB = 2**30


def qwen2_vl_2b() -> Qwen2VLConfig:
    rope = dict(rope_type="default", rope_theta=1_000_000.0, mrope_section=[16, 24, 24])
    return checkpoints.tiny_config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151_936,
        rope_parameters=rope,
        vision_depth=32,
        vision_embed_dim=1280,
        vision_num_heads=16,
        vision_mlp_ratio=4,
        vision_patch_size=14,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    try:
        model = Qwen2VLForConditionalGeneration(qwen2_vl_2b())
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_208_985_600
    directory = checkpoints.save(model, tmp_path_factory.mktemp("full") / "checkpoint", max_shard_size="4GB")
    checkpoints.processor(model.config, max_pixels=12_845_056).save_pretrained(directory)
    return directory


def peak_memory(*arguments: str) -> int:
    """The peak memory in bytes of `python -m lattejax.convert`, measured by itself: the resource usage of a child
    process would include the peak of a large parent."""
    program = """
import atexit, runpy, sys
sys.argv[0] = "convert"
atexit.register(lambda: print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))))
runpy.run_module("lattejax.convert", run_name="__main__")
"""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, check=True)
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1])


@pytest.mark.slow
def test_conversion_within_its_memory_and_the_logits_of_a_photo(checkpoint, tmp_path):
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    ours, back = tmp_path / "ours", tmp_path / "back"
    peaks = [
        peak_memory(f"--source={checkpoint}", f"--out={ours}"),
        peak_memory(f"--source={ours}", f"--out={back}", "--to=hf"),
    ]
    print(f"stored {stored / GIB:.2f} GiB, peaks {[round(peak / GIB, 2) for peak in peaks]} GiB")
    assert max(peaks) < stored + 2 * GIB

    answerer = Answerer.load(ours, "float32")
    photo = Image.fromarray(load_sample_image("china.jpg"))
    prompt = answerer.encoder.question("Which digit is this?", [answerer.encoder.read_image(photo)])
    batch = answerer.encoder.batch([prompt])

    @jax.jit
    def all_logits(params, batch):
        hidden, _ = qwen2_vl.forward(answerer.config, params, batch)
        return qwen2_vl.logits(answerer.config, params, hidden)

    logits = np.asarray(all_logits(answerer.params, batch))[0]
    answerer.encoder.stop_tokens = (-1,)
    ours = [int(token[0]) for token in answerer.tokens(batch, Decoding(max_tokens=8))]
    image_token = answerer.encoder.image_token
    del answerer
    gc.collect()

    # transformers reads here the checkpoint that was written back.
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(back, dtype=torch.float32).eval()
    ids = torch.tensor(prompt.input_ids)[None]
    inputs = dict(
        input_ids=ids,
        mm_token_type_ids=(ids == image_token).int(),
        pixel_values=torch.tensor(prompt.images[0].patches),
        image_grid_thw=torch.tensor([prompt.images[0].grid]),
    )
    with torch.no_grad():
        expected = theirs(**inputs).logits[0].numpy()
    difference = np.abs(logits - expected).max()
    print(f"{ids.shape[1]} tokens; logits differ by {difference:.1e} at most, their spread is {expected.std():.2f}")
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    theirs.generation_config.eos_token_id = None
    assert ours == theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
