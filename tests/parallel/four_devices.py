"""Run by test_contexts.py in a process of its own, on four simulated devices; prints JSON."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lattejax import configuration
from lattejax.data.examples import image_batcher, open_source
from lattejax.models import functional, latte_flow, qwen2_vl
from lattejax.models.qwen2_vl import Prompts
from lattejax.parallel import rules
from lattejax.parallel.mesh import make_mesh
from lattejax.sampling.images import read_prompts
from lattejax.training.objectives import FlowLoss, Frozen
from lattejax.training.plans import caption_prompts
from tests.helpers import config_file, encoder_for, randomize, tiny_config

CONFIG = tiny_config(model__num_groups=4)
MODEL, ENCODER, SOURCE = CONFIG.model_config, encoder_for(CONFIG), open_source(CONFIG)
LOSS = FlowLoss(
    MODEL,
    density=CONFIG.train.flow_density,
    stratified=True,
    prompt_dropout=0.1,
    answer_weight=1.0,
    dtype=jnp.float32,
    remat="none",
    unroll=False,
)


def main() -> None:
    params = randomize(
        latte_flow.init(MODEL, qwen2_vl.init(MODEL.vlm, jax.random.key(0)), jax.random.key(1)), scale=0.1
    )
    trained, fixed = latte_flow.split_trained(MODEL, params)
    table = read_prompts(MODEL, fixed["vlm"], caption_prompts(CONFIG, ENCODER, SOURCE.captions))
    drawings = SOURCE.drawings("train", ENCODER).__getitems__(range(16))
    rows = {"images": image_batcher(CONFIG, ENCODER, SOURCE.captions)(drawings)}
    keys = {"images": jax.random.split(jax.random.key(5), 16)}
    gradient = jax.jit(jax.grad(lambda trained, table, rows, keys: LOSS(trained, Frozen({}, table), rows, keys)[0]))
    alone = gradient(trained, table, rows, keys)

    mesh = make_mesh({"expert": 4})
    everywhere, divided = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("expert"))
    experts = jax.device_put(trained["experts"], rules.by_layer(mesh, trained["experts"]))
    trained = jax.device_put(trained, everywhere) | {"experts": experts}
    layers = jax.device_put(table.layers, rules.by_layer(mesh, table.layers))
    table = jax.device_put(table._replace(layers=None), everywhere)._replace(layers=layers)
    rows, keys = jax.device_put((rows, keys), divided)
    compiled = gradient.lower(trained, table, rows, keys).compile()
    together = compiled(trained, table, rows, keys)
    print(
        json.dumps(
            {
                "layers_on_each_device": sorted(
                    {shard.data.shape[0] for leaf in jax.tree.leaves(table.layers) for shard in leaf.addressable_shards}
                ),
                "collectives": sorted(
                    set(re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)", compiled.as_text()))
                ),
                "difference": max(
                    float(np.abs(np.asarray(a) - np.asarray(b)).max())
                    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True)
                ),
                "gibibytes_at_2b": at_2b(mesh),
                "largest": max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(alone)),
            }
        )
    )


def at_2b(mesh: Mesh) -> list[float]:
    """What the contexts of configs/imagenet256.py take, in all and on each device."""
    config = configuration.resolve(config_file("imagenet256"))
    model, dtype, shape = config.model_config, jnp.dtype(config.dtype), (1001, config.data.prompt_length)

    def read(key):
        prompts = Prompts(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool), jnp.zeros((1001, 3, shape[1])), None)
        return read_prompts(model, functional.cast_floats(qwen2_vl.init(model.vlm, key), dtype), prompts).layers

    layers = jax.eval_shape(read, jax.random.key(0))
    placed = rules.by_layer(mesh, layers)
    leaves = list(zip(jax.tree.leaves(layers), jax.tree.leaves(placed), strict=True))
    own = sum(math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, where in leaves)
    return [sum(leaf.size * leaf.dtype.itemsize for leaf, _ in leaves) / 2**30, own / 2**30]


if __name__ == "__main__":
    main()
