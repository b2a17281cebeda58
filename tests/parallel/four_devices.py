"""Run by test_contexts.py in a process of its own, on four simulated devices; prints JSON."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lattejax.data.examples import image_batcher, open_source
from lattejax.models import latte_flow, qwen2_vl
from lattejax.parallel import rules
from lattejax.parallel.mesh import make_mesh
from lattejax.sampling.images import read_prompts
from lattejax.training.objectives import FlowLoss, Frozen
from lattejax.training.plans import caption_prompts
from tests.helpers import encoder_for, randomize, tiny_config

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
                "largest": max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(alone)),
            }
        )
    )


if __name__ == "__main__":
    main()
