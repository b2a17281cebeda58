"""The generation pathway in plain float64 NumPy, as the method defines it: one image, one head, one number at a time.

It shares nothing with the package except the names in the trees of weights.
"""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def linear(x, params):
    weight = params["weight"]
    return x @ weight.reshape(-1, weight.shape[-1]).T + np.ravel(params.get("bias", 0.0))


def rotated(x, position, sections, theta):
    """Rotates one head's vector x [d] for one (time, row, column) position."""
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


def project(attention, text, x, positions):
    """Returns rotated queries [N, H, d], rotated keys and values [N, G, d]."""
    parts = [linear(x, attention[name]).reshape(len(x), -1, text.head_dim) for name in ("q_proj", "k_proj", "v_proj")]
    for part in parts[:2]:
        for n, position in enumerate(positions):
            for head in range(part.shape[1]):
                part[n, head] = rotated(part[n, head], position, text.mrope_section, text.rope_theta)
    return parts


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def feed_forward(x, mlp):
    return linear(silu(linear(x, mlp["gate_proj"])) * linear(x, mlp["up_proj"]), mlp["down_proj"])


def read(params, text, input_ids):
    """One unpadded prompt of text through the language model; returns each layer's keys and values [T, G, d]."""
    h, count = params["vocabulary"]["embedding"][input_ids], len(input_ids)
    positions = [(i, i, i) for i in range(count)]
    contexts, eps = [], text.rms_norm_eps
    for i in range(text.num_layers):
        decoder = take(params["layers"], i)
        q, k, v = project(decoder["attention"], text, rms(h, decoder["input_norm"]["scale"], eps), positions)
        contexts.append((k, v))
        mixed = np.empty_like(q)
        for head in range(text.num_heads):
            group = head // (text.num_heads // text.num_kv_heads)
            scores = q[:, head] @ k[:, group].T / np.sqrt(text.head_dim)
            scores[np.triu_indices(count, 1)] = -np.inf
            mixed[:, head] = softmax(scores) @ v[:, group]
        h = h + mixed.reshape(count, -1) @ decoder["attention"]["o_proj"]["weight"].T
        h = h + feed_forward(rms(h, decoder["post_attention_norm"]["scale"], eps), decoder["mlp"])
    return contexts


def take(stacked, i):
    """Layer i of a nested dict of stacked arrays."""
    return {name: take(leaf, i) if isinstance(leaf, dict) else leaf[i] for name, leaf in stacked.items()}


def layer(params, decoder, text, h, c, positions, context_k, context_v, previous, residual):
    """One generation layer; `decoder` has its weights of a VLM layer; contexts are [T, G, d], unpadded.

    Returns h, and the map or its logits [H, N, N].
    """
    heads, groups, d, eps = text.num_heads, text.num_kv_heads, text.head_dim, text.rms_norm_eps
    a_scale, m_scale, scale, shift = np.split(linear(silu(c), params["modulation"]), 4)

    q, k, v = project(decoder["attention"], text, rms(h, decoder["input_norm"]["scale"], eps), positions)
    count, tokens = len(h), len(context_k)
    carried, mixed = np.empty((heads, count, count)), np.empty((count, heads, d))
    for head in range(heads):
        group = head // (heads // groups)
        keys, values = (np.concatenate([a[:, group], b[:, group]]) for a, b in ((context_k, k), (context_v, v)))
        scores = q[:, head] @ keys.T / np.sqrt(d)
        if residual != "none":
            gates = np.tanh(linear(c, params["residual_gate"]))
            gate = gates[head] if len(gates) > 1 else gates[0]
        if previous is not None and residual == "logits":
            scores[:, tokens:] += gate * previous[head]
        weights = softmax(scores)
        if previous is not None and residual == "probabilities":
            weights[:, tokens:] += gate * previous[head]
        carried[head] = (scores if residual == "logits" else weights)[:, tokens:]
        mixed[:, head] = weights @ values
    out = mixed.reshape(count, -1) @ decoder["attention"]["o_proj"]["weight"].T
    h = h + (1 + a_scale) * rms(out, params["attention_norm"]["scale"], eps)

    x = rms(h, decoder["post_attention_norm"]["scale"], eps) * (1 + scale) + shift
    return h + (1 + m_scale) * rms(feed_forward(x, decoder["mlp"]), params["mlp_norm"]["scale"], eps), carried


def place(width, row, column):
    """The table entry added to an embedded latent at its row and column: for each, sines and then cosines."""
    out = []
    for position in (row, column):
        for wave in (np.sin, np.cos):
            out += [wave(position / 10_000 ** (i / (width / 4))) for i in range(width // 4)]
    return np.array(out)


def velocity(params, config, layers, decoders, x_t, t, contexts, start):
    """One image through one group: `layers`, `decoders` and `contexts` have an entry for each of its M layers."""
    text, patch = config.text, config.patch_size
    height, width, channels = x_t.shape
    tokens, positions = [], []
    for row in range(0, height, patch):
        for column in range(0, width, patch):
            tokens.append(x_t[row : row + patch, column : column + patch].reshape(-1))
            positions.append((start, start + row // patch, start + column // patch))
    c = time_embedding(params["time"], t)
    h = linear(np.array(tokens), params["embedding"]["proj"])
    if config.latent_position == "sincos":
        h = h + [place(text.hidden_size, row - start, column - start) for _, row, column in positions]
    previous = None
    for weights, decoder, (context_k, context_v) in zip(layers, decoders, contexts, strict=True):
        h, previous = layer(
            weights, decoder, text, h, c, positions, context_k, context_v, previous, config.residual_attention
        )
    scale, shift = np.split(linear(silu(c), params["head"]["modulation"]), 2)
    out = linear(
        rms(h, params["head"]["norm"]["scale"], text.rms_norm_eps) * (1 + scale) + shift, params["head"]["proj"]
    )
    image = np.empty_like(x_t)
    for token, (_, row, column) in zip(out, positions, strict=True):
        top, left = (row - start) * patch, (column - start) * patch
        image[top : top + patch, left : left + patch] = token.reshape(patch, patch, channels)
    return (image - x_t) / max(1 - t, 0.05) if config.prediction == "x" else image
