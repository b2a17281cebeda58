"""Qwen2-VL's language model in transformers, with our weights."""

import jax
import numpy as np
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from lattejax.models.functional import Params
from lattejax.models.qwen2_vl import Prompts, VLMConfig
from lattejax.weights import naming


def geometry(config: VLMConfig) -> Qwen2VLConfig:
    """Our geometry as a transformers config."""
    text, vision = config.text, config.vision
    rope = dict(rope_type="default", rope_theta=text.rope_theta, mrope_section=list(text.mrope_section))
    return Qwen2VLConfig(
        text_config=dict(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_layers,
            num_attention_heads=text.num_heads,
            num_key_value_heads=text.num_kv_heads,
            vocab_size=text.vocab_size,
            rms_norm_eps=text.rms_norm_eps,
            rope_parameters=rope,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            tie_word_embeddings=text.tie_word_embeddings,
        ),
        vision_config=dict(
            depth=vision.depth,
            embed_dim=vision.embed_dim,
            num_heads=vision.num_heads,
            mlp_ratio=vision.mlp_ratio,
            patch_size=vision.patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            hidden_size=text.hidden_size,
        ),
        tie_word_embeddings=text.tie_word_embeddings,
    )


def model_of(config: VLMConfig, params: Params) -> Qwen2VLForConditionalGeneration:
    """The model with our weights (a tree for each layer); it shares their memory."""
    model = Qwen2VLForConditionalGeneration(geometry(config))
    ours = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(params)
    }
    theirs = {}
    for leaf in naming.leaves(config):
        for i, name in enumerate(leaf.names):
            path = leaf.path.replace("/layers/", f"/layers/{i}/").replace("/blocks/", f"/blocks/{i}/")
            name = f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
            theirs[name] = torch.from_dlpack(ours[path]).reshape(leaf.tensor_shape)
    missing, unexpected = model.load_state_dict(theirs, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model.eval()


class Reader:
    """Reads one batch of unpadded text prompts, and answers it greedily."""

    def __init__(self, config: VLMConfig, params: Params, prompts: Prompts):
        self.model = model_of(config, params)
        self.inputs = dict(
            input_ids=torch.tensor(np.asarray(prompts.input_ids, np.int64)),
            attention_mask=torch.ones(prompts.input_ids.shape, dtype=torch.long),
        )

    @torch.no_grad()
    def read(self):
        return self.model.model(**self.inputs, use_cache=True).past_key_values

    def last_values(self) -> np.ndarray:
        """The last layer's values [B, T, G, d]."""
        return self.read().layers[-1].values.transpose(1, 2).numpy()

    @torch.no_grad()
    def answer(self, new_tokens: int) -> np.ndarray:
        """Returns the answers' tokens [B, new_tokens]."""
        tokens = self.model.generate(**self.inputs, max_new_tokens=new_tokens, do_sample=False)
        return tokens[:, self.inputs["input_ids"].shape[1] :].numpy()
