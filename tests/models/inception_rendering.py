"""The Inception network of 2015 in plain PyTorch, written from the graph's description; and random weights for it."""

from pathlib import Path

import jax
import numpy as np
import torch
import torch.nn.functional as F
from flax import traverse_util

from lattejax.models import functional
from lattejax.models.inception import Inception
from lattejax.weights.convolutions import _name, _to_torch


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights whose activations neither vanish nor grow, under the circulating files' names."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(lambda: functional.init(Inception, key=jax.random.key(0)))
    state = {}
    for path, array in traverse_util.flatten_dict(abstract, sep="/").items():
        name, shape = _name(path), _to_torch(array.shape)
        if name.endswith("running_var"):
            values = rng.uniform(0.5, 1.5, shape)
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
        elif len(shape) > 1:
            values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("bn.weight"):
            values = rng.uniform(0.8, 1.2, shape)
        else:
            values = 0.1 * rng.standard_normal(shape)
        state[name] = torch.tensor(values, dtype=torch.float32)
    return state


def save(state: dict[str, torch.Tensor], path: Path, earlier: bool = False) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=not earlier)
    return path


def resize(images: np.ndarray) -> torch.Tensor:
    """NHWC to NCHW of 299×299 pixels, in float64, one pixel after the other."""
    for axis in (1, 2):
        size, rows = images.shape[axis], []
        for i in range(299):
            place = i * size / 299
            lower = int(place)
            low, high = (images.take(min(j, size - 1), axis).astype(np.float64) for j in (lower, lower + 1))
            rows.append(low + (high - low) * (place - lower))
        images = np.stack(rows, axis)
    return torch.tensor(images).permute(0, 3, 1, 2)


def features(state: dict[str, torch.Tensor], images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pool_3, the 7 channels of mixed_6/conv, and the logits without bias, in float64."""
    state = {name: x.double() for name, x in state.items()}

    def unit(name: str, x: torch.Tensor, stride: int = 1, pad: bool = True) -> torch.Tensor:
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=[n // 2 for n in weight.shape[2:]] if pad else 0)
        bn = [state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *bn, eps=1e-3))

    def through(block: str, x: torch.Tensor, *names: str) -> torch.Tensor:
        for name in names:
            x = unit(f"{block}.{name}", x)
        return x

    def down(name: str, x: torch.Tensor) -> torch.Tensor:
        return unit(name, x, 2, False)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def numbered(name: str, count: int) -> list[str]:
        return [f"{name}_{i + 1}" for i in range(count)]

    x = (resize(images) - 128) / 128
    x = unit("Conv2d_2b_3x3", unit("Conv2d_2a_3x3", down("Conv2d_1a_3x3", x), pad=False))
    x = unit("Conv2d_4a_3x3", unit("Conv2d_3b_1x1", F.max_pool2d(x, 3, 2)), pad=False)
    x = F.max_pool2d(x, 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        branches = ["branch1x1"], numbered("branch5x5", 2), numbered("branch3x3dbl", 3)
        x = torch.cat([*(through(block, x, *names) for names in branches), unit(f"{block}.branch_pool", mean(x))], 1)
    last = down("Mixed_6a.branch3x3dbl_3", through("Mixed_6a", x, *numbered("branch3x3dbl", 2)))
    x = torch.cat([down("Mixed_6a.branch3x3", x), last, F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        if block == "Mixed_6d":
            spatial = unit("Mixed_6d.branch1x1", x)[:, :7].permute(0, 2, 3, 1).flatten(1)
        branches = ["branch1x1"], numbered("branch7x7", 3), numbered("branch7x7dbl", 5)
        x = torch.cat([*(through(block, x, *names) for names in branches), unit(f"{block}.branch_pool", mean(x))], 1)
    three = down("Mixed_7a.branch3x3_2", unit("Mixed_7a.branch3x3_1", x))
    seven = down("Mixed_7a.branch7x7x3_4", through("Mixed_7a", x, *numbered("branch7x7x3", 3)))
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    for block, pooled in (("Mixed_7b", mean), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        single, double = unit(f"{block}.branch3x3_1", x), through(block, x, *numbered("branch3x3dbl", 2))
        parts = [unit(f"{block}.branch1x1", x)]
        parts += [unit(f"{block}.branch3x3_2{letter}", single) for letter in "ab"]
        parts += [unit(f"{block}.branch3x3dbl_3{letter}", double) for letter in "ab"]
        x = torch.cat([*parts, unit(f"{block}.branch_pool", pooled(x))], 1)
    pool = x.mean(dim=(2, 3))
    return tuple(part.numpy() for part in (pool, spatial, pool @ state["fc.weight"].T))
