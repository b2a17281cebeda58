"""The generation pathway in plain float64 NumPy: one image, one head and one number at a time, as the method says it.

Nothing here is shared with the package but the names in the trees of weights.
"""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def linear(x, params):
    return x @ params["kernel"] + params.get("bias", 0.0)


def rotated(x, position, sections, theta):
    """Turns one head's vector x [d] at one (time, row, column) position."""
    half = len(x) // 2
    out = np.empty_like(x)
    axis_of = [axis for axis, count in enumerate(sections) for _ in range(count)]
    for i in range(half):
        angle = position[axis_of[i]] * theta ** (-2 * i / len(x))
        cos, sin = np.cos(angle), np.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


def time_embedding(params, t):
    frequencies = 10_000.0 ** (-np.arange(128) / 128)
    sinusoids = np.concatenate([np.cos(1000 * t * frequencies), np.sin(1000 * t * frequencies)])
    return linear(silu(linear(sinusoids, params["fc1"])), params["fc2"])


def layer(params, text, h, c, positions, context_k, context_v, previous, residual):
    """One generation layer; contexts are [T, G, d], unpadded. Returns h and the map [H, N, N]."""
    heads, groups, d, eps = text.num_heads, text.num_kv_heads, text.head_dim, text.rms_norm_eps
    decoder, attention, mlp = params["decoder"], params["decoder"]["attention"], params["decoder"]["mlp"]
    a_scale, m_scale, scale, shift = np.split(linear(silu(c), params["modulation"]), 4)

    x = rms(h, decoder["input_norm"]["scale"], eps)
    q = linear(x, attention["q_proj"]).reshape(-1, heads, d)
    k = linear(x, attention["k_proj"]).reshape(-1, groups, d)
    v = linear(x, attention["v_proj"]).reshape(-1, groups, d)
    count = len(h)
    maps, mixed = np.empty((heads, count, count)), np.empty((count, heads, d))
    for head in range(heads):
        group = head // (heads // groups)
        keys = [rotated(k[n, group], positions[n], text.mrope_section, text.rope_theta) for n in range(count)]
        keys = np.concatenate([context_k[:, group], np.array(keys)])
        values = np.concatenate([context_v[:, group], v[:, group]])
        queries = [rotated(q[n, head], positions[n], text.mrope_section, text.rope_theta) for n in range(count)]
        scores = np.array(queries) @ keys.T / np.sqrt(d)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        tokens = len(context_k)
        if previous is not None and residual == "probabilities":
            gate = np.tanh(linear(c, params["residual_gate"])[head])
            weights[:, tokens:] += gate * previous[head]
        maps[head] = weights[:, tokens:]
        mixed[:, head] = weights @ values
    out = mixed.reshape(count, -1) @ attention["o_proj"]["kernel"]
    h = h + (1 + a_scale) * rms(out, params["attention_norm"]["scale"], eps)

    x = rms(h, decoder["post_attention_norm"]["scale"], eps) * (1 + scale) + shift
    out = linear(silu(linear(x, mlp["gate_proj"])) * linear(x, mlp["up_proj"]), mlp["down_proj"])
    return h + (1 + m_scale) * rms(out, params["mlp_norm"]["scale"], eps), maps


def velocity(params, config, layers, x_t, t, contexts, start):
    """One image through one group: `layers` and `contexts` have an entry for each of its M layers."""
    text, patch = config.text, config.patch_size
    height, width, channels = x_t.shape
    tokens, positions = [], []
    for row in range(0, height, patch):
        for column in range(0, width, patch):
            tokens.append(x_t[row : row + patch, column : column + patch].reshape(-1))
            positions.append((start, start + row // patch, start + column // patch))
    c = time_embedding(params["time"], t)
    h = linear(np.array(tokens), params["embedding"]["proj"])
    previous = None
    for weights, (context_k, context_v) in zip(layers, contexts, strict=True):
        h, previous = layer(weights, text, h, c, positions, context_k, context_v, previous, config.residual_attention)
    scale, shift = np.split(linear(silu(c), params["head"]["modulation"]), 2)
    out = linear(
        rms(h, params["head"]["norm"]["scale"], text.rms_norm_eps) * (1 + scale) + shift, params["head"]["proj"]
    )
    image = np.empty_like(x_t)
    for token, (_, row, column) in zip(out, positions, strict=True):
        top, left = (row - start) * patch, (column - start) * patch
        image[top : top + patch, left : left + patch] = token.reshape(patch, patch, channels)
    return image
