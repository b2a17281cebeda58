"""The generation pathway in eager PyTorch, written in the usual style, with our weights.

Axes: B batch, T context token, N image token, H query head, D width, d head dimension.
"""

import jax
import numpy as np
import torch
from torch.nn.functional import linear, rms_norm, silu

from lattejax.configuration import Config
from lattejax.models.functional import Params
from lattejax.models.generation import Context
from lattejax.models.generation_config import GenerationConfig


def tensors(tree):
    """Converts our arrays to tensors that share their memory."""
    return jax.tree.map(torch.from_dlpack, tree)


def apply(params, x):
    """A linear map; if its outputs have axes for heads and head dimension, it merges them."""
    bias = params.get("bias")
    return linear(x, params["weight"].flatten(0, -2), None if bias is None else bias.flatten())


class Positions:
    """Positions of image tokens after `start` tokens: M-RoPE, and the table added to the embedded latents."""

    def __init__(self, config: GenerationConfig, start: int):
        text, (rows, columns) = config.text, config.grid
        positions = np.indices((1, rows, columns)).reshape(3, -1)
        frequencies = text.rope_theta ** (-np.arange(0, text.head_dim, 2) / text.head_dim)
        angles = (positions + start)[np.repeat(np.arange(3), text.mrope_section)].T * frequencies
        angles = torch.tensor(np.concatenate([angles, angles], axis=-1), dtype=torch.float32)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.table = torch.zeros(())
        if config.latent_position == "sincos":
            frequencies = 10_000 ** (-4 * np.arange(text.hidden_size // 4) / text.hidden_size)
            angles = positions[1:, :, None] * frequencies
            table = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
            self.table = torch.tensor(np.concatenate(table, axis=-1), dtype=torch.float32)

    def rotate(self, x):  # [B, heads, N, d]
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin


def layer(config: GenerationConfig, params, h, c, positions: Positions, keys, values, previous_map):
    """One layer; keys and values are the context's, [B, G, T, d]. Returns the hidden states and the map."""
    text, decoder = config.text, params["decoder"]
    batch, count, width = h.shape
    eps, repeats = text.rms_norm_eps, text.num_heads // text.num_kv_heads
    attention_scale, mlp_scale, norm_scale, norm_shift = apply(params["modulation"], silu(c))[:, None].chunk(4, dim=-1)

    x = rms_norm(h, (width,), decoder["input_norm"]["scale"], eps)
    q, k, v = (
        apply(decoder["attention"][name], x).view(batch, count, -1, text.head_dim).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    k = torch.cat([keys, positions.rotate(k)], dim=2).repeat_interleave(repeats, dim=1)
    v = torch.cat([values, v], dim=2).repeat_interleave(repeats, dim=1)
    scores = positions.rotate(q) @ k.transpose(-1, -2) / text.head_dim**0.5
    on_context, on_image = scores.softmax(-1).split([keys.shape[2], count], dim=-1)
    if previous_map is not None:
        on_image = on_image + torch.tanh(apply(params["residual_gate"], c))[..., None, None] * previous_map
    mixed = torch.cat([on_context, on_image], dim=-1) @ v
    mixed = apply(decoder["attention"]["o_proj"], mixed.transpose(1, 2).reshape(batch, count, width))
    h = h + (1 + attention_scale) * rms_norm(mixed, (width,), params["attention_norm"]["scale"], eps)

    x = rms_norm(h, (width,), decoder["post_attention_norm"]["scale"], eps) * (1 + norm_scale) + norm_shift
    mlp = decoder["mlp"]
    x = apply(mlp["down_proj"], silu(apply(mlp["gate_proj"], x)) * apply(mlp["up_proj"], x))
    return h + (1 + mlp_scale) * rms_norm(x, (width,), params["mlp_norm"]["scale"], eps), on_image


def velocity(config: GenerationConfig, params, positions: Positions, contexts, x_t, t):
    """One group's velocity [B, h, w, C], with patches of one latent; contexts are each layer's keys and values
    [B, G, T, d]; t [B or 1]."""
    (rows, columns), channels, width = config.grid, config.token_dim, config.text.hidden_size
    h = apply(params["embedding"]["proj"], x_t.reshape(len(x_t), rows * columns, channels)) + positions.table
    frequencies = torch.tensor(1000 * 10_000.0 ** (-np.arange(128) / 128), dtype=torch.float32)
    angles = t[:, None] * frequencies
    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
    c = apply(params["time"]["fc2"], silu(apply(params["time"]["fc1"], sinusoids)))
    carried = None
    for expert, (keys, values) in zip(params["experts"], contexts, strict=True):
        h, carried = layer(config, expert, h, c, positions, keys, values, carried)
    head = params["head"]
    scale, shift = apply(head["modulation"], silu(c))[:, None].chunk(2, dim=-1)
    h = rms_norm(h, (width,), head["norm"]["scale"], config.text.rms_norm_eps) * (1 + scale) + shift
    out = apply(head["proj"], h).reshape(x_t.shape)
    return (out - x_t) / (1 - t).clamp(min=0.05)[:, None, None, None] if config.prediction == "x" else out


class Sampler:
    """Euler's method in equal steps with one group, guided unless the scale is 1; the last context is unconditional."""

    def __init__(
        self, config: GenerationConfig, pathway: Params, contexts: Context, noise, guidance: float, steps: int
    ):
        self.config, self.params, self.noise = config, tensors(pathway), torch.from_dlpack(noise)
        self.guidance, self.steps = guidance, steps
        self.positions = Positions(config, contexts.mask.shape[1])
        batch = len(noise)
        chosen = list(range(batch)) + [batch] * batch * (guidance != 1)
        self.contexts = [
            tuple(torch.from_dlpack(part)[chosen].transpose(1, 2) for part in pair) for pair in contexts.layers
        ]

    @torch.no_grad()
    def draw(self) -> np.ndarray:
        x = self.noise
        for step in range(self.steps):
            inputs = x if self.guidance == 1 else torch.cat([x, x])
            t = torch.tensor([step / self.steps])
            v = velocity(self.config, self.params, self.positions, self.contexts, inputs, t)
            if self.guidance != 1:
                conditional, unconditional = v.chunk(2)
                v = unconditional + self.guidance * (conditional - unconditional)
            x = x + v / self.steps
        return x.numpy()


class Trainer:
    """Flow matching of one group with AdamW, every step on the same latents, noise and times; row j has prompt j."""

    def __init__(self, config: Config, trained: Params, contexts: Context, latents, noise, t):
        stage, self.config = config.train, config.model_config.generation
        layers = [jax.tree.map(lambda x, i=i: x[i], trained["experts"]) for i in range(self.config.text.num_layers)]

        def own(array) -> torch.Tensor:
            return torch.tensor(np.asarray(array)).requires_grad_()

        self.params = jax.tree.map(own, trained | {"experts": layers})
        self.latents, self.noise, self.t = (torch.tensor(np.asarray(x)) for x in (latents, noise, t))
        self.contexts = [
            tuple(torch.tensor(np.asarray(part[i]))[: len(latents)].transpose(1, 2) for part in contexts.layers)
            for i in range(self.config.text.num_layers)
        ]
        self.positions = Positions(self.config, contexts.mask.shape[1])
        self.leaves, self.clip_norm = jax.tree.leaves(self.params), stage.clip_norm
        by_path = jax.tree.leaves_with_path(self.params)
        groups = [
            {"params": [leaf for path, leaf in by_path if (path[-1].key == "weight") == matrix], "weight_decay": decay}
            for matrix, decay in ((True, stage.weight_decay), (False, 0.0))
        ]
        betas = (stage.adam_b1, stage.adam_b2)
        self.optimizer = torch.optim.AdamW(groups, stage.learning_rate, betas=betas, fused=True)

    def step(self) -> np.ndarray:
        """Takes a step; returns the loss and the gradient's norm before clipping."""
        t = self.t[:, None, None, None]
        x_t = t * self.latents + (1 - t) * self.noise
        v = velocity(self.config, self.params, self.positions, self.contexts, x_t, self.t)
        target = self.latents - self.noise
        if self.config.prediction == "x":
            target = (self.latents - x_t) / (1 - t).clamp(min=0.05)
        loss = (v - target).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.leaves, self.clip_norm)
        self.optimizer.step()
        return np.stack([loss.detach().numpy(), norm.numpy()])

    def head(self) -> np.ndarray:
        """The head's current weight."""
        return self.params["head"]["proj"]["weight"].detach().numpy()
