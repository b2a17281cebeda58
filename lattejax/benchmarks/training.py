"""The speed of training one group of layers; see `measuring`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lattejax.benchmarks.measuring import (
    Result,
    Work,
    first_group,
    layer_products,
    load_baseline,
    measure,
    must_agree,
    num_tokens,
    random_like,
    without_vision,
)
from lattejax.configuration import Config
from lattejax.errors import UserError
from lattejax.models import flops
from lattejax.models.generation import Context
from lattejax.models.text import KeysValues
from lattejax.objectives.flow import Frozen
from lattejax.parallel import rules
from lattejax.parallel.mesh import one_device
from lattejax.runs.shapes import abstract_trained
from lattejax.training.costs import TRAINING_PASSES
from lattejax.training.generation_stage import flow_loss
from lattejax.training.layout import stage_rows
from lattejax.training.step import compile_for, init_state, make_train_step, row_keys


def train(config: Config, work: Work, against: str) -> Result:
    """Forward, backward and AdamW of one group of L/K layers on given contexts, without a moving average."""
    if config.trains_answers:
        raise UserError("train supports only model.variant='couple'; Blend's step also trains the VLM on answers")
    config = without_vision(first_group(config))
    plain = dict(accumulation=1, warmup_steps=0, decay="none", prompt_dropout=0.0, share_contexts=True, stratified=True)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=work.batch_size, **plain))
    model, rows, loss = config.model_config, stage_rows(config)["train"], flow_loss(config)
    trained = random_like(abstract_trained(config))
    contexts = random_contexts(config, work)
    indices = rows["images"].indices
    latents = np.random.default_rng(1).standard_normal((*indices.shape, *config.data.latent_shape), np.float32)
    batch, key = {"images": {"latents": latents, "caption": indices}}, jax.random.key(0)
    frozen = Frozen({}, contexts=contexts)

    calls, baseline = {}, None
    if against:
        u, noise, _ = loss.draw(row_keys(jax.random.fold_in(key, 0), indices[0]))
        t = model.generation.intervals.draw(u, loss.density)[0]
        baseline = load_baseline("pathway").Trainer(config, trained, contexts, latents[0, 0], noise[0], t)
        calls["theirs"] = baseline.step
    first_head = np.array(trained["head"]["proj"]["weight"])

    stage, mesh = dataclasses.replace(config.train, ema_decay=0.0), one_device()  # no moving average
    init = functools.partial(init_state, stage)
    placed = rules.shardings(mesh, jax.eval_shape(init, trained))
    state = jax.jit(init, out_shardings=placed, donate_argnums=0)(trained)
    step = compile_for(mesh, make_train_step(stage, loss, rows), state, frozen, rows)

    def ours():
        nonlocal state
        state, metrics = step(state, frozen, batch, key)
        return metrics

    if baseline is not None:
        mine, theirs = ours(), baseline.step()
        must_agree([mine["loss"], mine["grad_norm"]], theirs)
        must_agree(np.array(state.params["head"]["proj"]["weight"]) - first_head, baseline.head() - first_head)
    products = layer_products(model.vlm.text, work.batch_size * num_tokens(config))
    step_flops = TRAINING_PASSES * flops.velocity(model.generation, work.prompt_tokens) * work.batch_size
    return measure(config, work, {"ours": ours} | calls, products, step_flops, against)[0]


def random_contexts(config: Config, work: Work) -> Context:
    """Random contexts for each row's prompt and the empty prompt."""
    text, count, length = config.model.text, work.batch_size + 1, work.prompt_tokens
    shape = jax.ShapeDtypeStruct((text.num_layers, count, length, text.num_kv_heads, text.head_dim), config.dtype)
    layers = random_like(KeysValues(shape, shape), jnp.dtype(config.dtype))
    return Context(layers, jnp.ones((count, length), bool), jnp.full(count, length, jnp.int32))
