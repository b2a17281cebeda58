"""One optimizer step: gradients over micro-batches, clipping, AdamW, and the moving average."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Int, Key

from lattejax.configuration import Stage
from lattejax.models.functional import Params


class TrainState(NamedTuple):
    """All that a step changes. `params` and `ema` are float32."""

    step: Int[Array, ""]
    params: Params
    ema: Params
    optimizer: Any


def learning_rate(stage: Stage) -> optax.Schedule:
    """Linear warm-up, then constant, or a decay that would reach zero one step after the last."""
    after = max(stage.steps - stage.warmup_steps, 0) + 1
    tail = {
        "none": optax.constant_schedule(stage.learning_rate),
        "cosine": optax.cosine_decay_schedule(stage.learning_rate, after),
        "linear": optax.linear_schedule(stage.learning_rate, 0.0, after),
    }[stage.decay]
    warmup = optax.linear_schedule(0.0, stage.learning_rate, max(stage.warmup_steps, 1))
    # The first step is counted as step 1, so that it does not go to waste on a rate of zero.
    joined = optax.join_schedules([warmup, tail], [stage.warmup_steps])
    return lambda count: joined(count + 1)


def make_optimizer(stage: Stage) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(stage.clip_norm),
        optax.adamw(learning_rate(stage), stage.adam_b1, stage.adam_b2, weight_decay=stage.weight_decay),
    )


def init_state(stage: Stage, params: Params) -> TrainState:
    """The state before the first step; the average starts as a copy of the weights."""
    return TrainState(
        jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), make_optimizer(stage).init(params)
    )


def make_train_step(
    stage: Stage,
    loss: Callable[[Params, Any, Any, dict[str, Key[Array, "rows"]]], tuple[Array, dict[str, Array]]],
    *,
    blocks: Mapping[str, int] = MappingProxyType({}),
    gradient_metrics: Callable[[Params], dict[str, Array]] = lambda gradients: {},
) -> Callable[[TrainState, Any, Any, Key[Array, ""]], tuple[TrainState, dict[str, Array]]]:
    """Returns `step(state, frozen, batch, key) -> (state, metrics)`, to be jitted with the state donated.

    A batch has one or more streams of rows, by name. Row j's key is a function of (key, step, j), whatever the
    micro-batches and the devices.

    Args:
      stage: the stage's settings.
      loss: see `objectives`; a mean over rows.
      blocks: into how many contiguous blocks a stream's rows fall, one for each group that runs some of them. Every
        micro-batch takes the same share of each block.
      gradient_metrics: more metrics, of the gradients before clipping.
    """
    optimizer = make_optimizer(stage)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def micro_batches(stream, rows):
        pattern = "(K A b) ... -> A (K b) ..."
        return jax.tree.map(lambda x: rearrange(x, pattern, K=blocks.get(stream, 1), A=stage.accumulation), rows)

    def step(state, frozen, batch, key):
        rows = {name: jnp.arange(len(jax.tree.leaves(stream)[0])) for name, stream in batch.items()}
        key = jax.random.fold_in(key, state.step)
        keys = {name: jax.vmap(jax.random.fold_in, (None, 0))(key, index) for name, index in rows.items()}
        if stage.accumulation == 1:
            (_, metrics), gradients = value_and_grad(state.params, frozen, batch, keys)
        else:

            def add(total, micro):
                (_, metrics), gradients = value_and_grad(state.params, frozen, *micro)
                return jax.tree.map(jnp.add, total, (metrics, gradients)), None

            split = tuple({name: micro_batches(name, part[name]) for name in part} for part in (batch, keys))
            first = jax.tree.map(lambda x: x[0], split)
            shapes = jax.eval_shape(value_and_grad, state.params, frozen, *first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][1], shapes[1]))
            total, _ = jax.lax.scan(add, zeros, split)
            metrics, gradients = jax.tree.map(lambda x: x / stage.accumulation, total)

        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1 - stage.ema_decay)
        metrics |= {"grad_norm": optax.tree.norm(gradients)} | gradient_metrics(gradients)
        return TrainState(state.step + 1, params, ema, optimizer_state), metrics

    return step
