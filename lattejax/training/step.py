"""One optimizer step: gradients over micro-batches, clipping, AdamW and the moving average; and its compilation for a
mesh."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from lattejax.configuration import Stage
from lattejax.models.functional import Params
from lattejax.models.layers import rows_over
from lattejax.parallel import rules
from lattejax.parallel.mesh import ROW_AXES
from lattejax.parallel.rows import Rows

Loss = Callable[[Params, Any, Any, dict[str, Key[Array, "*rows"]]], tuple[Array, dict[str, Array]]]


class TrainState(NamedTuple):
    """Everything that a step changes. `params` and `ema` are float32; `skipped` counts the steps that changed nothing.
    `ema` is None if there is no averaging."""

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    params: Params
    ema: Params | None
    optimizer: Any

    @property
    def average(self) -> Params:
        """The weights for evaluation and sampling."""
        return self.params if self.ema is None else self.ema

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays of a checkpoint, by name."""
        kept = {"params": self.params, "ema": self.ema, "optimizer": self.optimizer}
        return {name: tree for name, tree in kept.items() if tree is not None}


def learning_rate(stage: Stage) -> optax.Schedule:
    """Linear warm-up, then constant, or a decay that would reach zero one step after the last."""
    after = max(stage.steps - stage.warmup_steps, 0) + 1
    tail = {
        "none": optax.constant_schedule(stage.learning_rate),
        "cosine": optax.cosine_decay_schedule(stage.learning_rate, after),
        "linear": optax.linear_schedule(stage.learning_rate, 0.0, after),
    }[stage.decay]
    warmup = optax.linear_schedule(0.0, stage.learning_rate, max(stage.warmup_steps, 1))
    # The first step counts as step 1, so that its rate is not zero.
    joined = optax.join_schedules([warmup, tail], [stage.warmup_steps])
    return lambda count: joined(count + 1)


def make_optimizer(stage: Stage, clip: optax.GradientTransformation | None = None) -> optax.GradientTransformation:
    """AdamW on clipped gradients, with weight decay on matrices only. `clip`, which has no state, clips them; None: by
    the norm of them all."""

    def decay(updates: Params, params: Params) -> Params:
        # Not optax.masked: its state has another tree structure than existing checkpoints.
        return jax.tree.map(
            lambda u, p, is_one: u + stage.weight_decay * p if is_one else u, updates, params, are_matrices(params)
        )

    adamw = optax.chain(
        optax.scale_by_adam(stage.adam_b1, stage.adam_b2),
        optax.stateless(decay),
        optax.scale_by_learning_rate(learning_rate(stage)),
    )
    return optax.chain(clip or optax.clip_by_global_norm(stage.clip_norm), adamw)


def are_matrices(params: Params) -> Any:
    """Which weights are matrices, by the last component of their path; scales of norms and biases are not."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key in rules.MATRICES, params)


def init_state(stage: Stage, params: Params) -> TrainState:
    """The state before the first step; the average starts as a copy of the weights, or is None with ema_decay=0."""
    zero, average = jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params) if stage.ema_decay else None
    return TrainState(zero, zero, params, average, make_optimizer(stage).init(params))


def abstract_state(stage: Stage, params: Params, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state of weights like `params`: moments and average are sharded like them.

    Raises:
      ValueError: the mesh does not fit the weights.
    """
    return rules.abstract(mesh, jax.eval_shape(functools.partial(init_state, stage), params))


def row_keys(key: Key[Array, ""], indices: Int[Array | np.ndarray, "*rows"]) -> Key[Array, "*rows"]:
    """Derives each row's PRNG key from the step's key and the row's index."""
    fold = functools.partial(jax.random.fold_in, key)
    for _ in indices.shape:
        fold = jax.vmap(fold)
    return fold(indices)


def make_train_step(
    stage: Stage,
    loss: Loss,
    rows: Mapping[str, Rows],
    gradient_metrics: Callable[[Params], dict[str, Array]] = lambda gradients: {},
    prepare: Callable[[Any], Any] = lambda batch: batch,
    clip: optax.GradientTransformation | None = None,
) -> Callable[[TrainState, Any, Any, Key[Array, ""]], tuple[TrainState, dict[str, Array]]]:
    """Returns `step(state, frozen, batch, key) -> (state, metrics)`, to be jitted with the state donated.

    A batch has one or more streams of rows, by name. Row j's key is a function of (key, step, j) alone, independent of
    micro-batches and devices. A step whose loss or gradient is not finite changes only the counts of steps and of
    skipped steps; the next step uses new PRNG keys, because the count of steps has changed.

    Args:
      stage: the stage's settings.
      loss: see `objectives`; a mean over rows.
      rows: how each stream's rows are arranged on the leading axes of its arrays, micro-batches first.
      gradient_metrics: more metrics, of the gradients before clipping.
      prepare: transforms the complete batch, before it is split into micro-batches.
      clip: see `make_optimizer`.
    """
    optimizer = make_optimizer(stage, clip)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        keys = {name: row_keys(key, rows[name].indices) for name in batch}
        batch = prepare(batch)
        if stage.accumulation == 1:
            batch, keys = jax.tree.map(lambda x: x[0], (batch, keys))
            (total_loss, metrics), gradients = value_and_grad(state.params, frozen, batch, keys)
        else:

            def add(total, micro):
                return jax.tree.map(jnp.add, total, value_and_grad(state.params, frozen, *micro)), None

            first = jax.tree.map(lambda x: x[0], (batch, keys))
            shapes = jax.eval_shape(value_and_grad, state.params, frozen, *first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            total, _ = jax.lax.scan(add, zeros, (batch, keys))
            (total_loss, metrics), gradients = jax.tree.map(lambda x: x / stage.accumulation, total)

        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(total_loss) & jnp.isfinite(norm)

        # A condition updates every array in place; selecting between old and new would keep both in memory.
        def update(params, ema, optimizer_state):
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
            params = optax.apply_updates(params, updates)
            if ema is not None:
                ema = optax.incremental_update(params, ema, 1 - stage.ema_decay)
            return params, ema, optimizer_state

        updated = jax.lax.cond(finite, update, lambda *same: same, state.params, state.ema, state.optimizer)
        skipped = (~finite).astype(jnp.int32)
        metrics |= {"grad_norm": norm, "skipped": skipped} | gradient_metrics(gradients)
        return TrainState(state.step + 1, state.skipped + skipped, *updated), metrics

    return step


def compile_for(
    mesh: Mesh, step: Callable, state: TrainState, frozen: Any, rows: Mapping[str, Rows]
) -> jax.stages.Wrapped:
    """Returns a train step jitted for a mesh, its state donated.

    Args:
      mesh: the mesh.
      step: see `make_train_step`.
      state: the state, or its description.
      frozen: the frozen inputs of every step, or their description.
      rows: how each stream's rows are arranged.
    """
    everywhere = rules.replicated(mesh)
    placed = rules.shardings(mesh, state)
    streams = {name: stream.sharding(mesh) for name, stream in rows.items()}
    return jax.jit(
        rows_over(mesh.abstract_mesh, ROW_AXES)(step),
        in_shardings=(placed, rules.shardings(mesh, frozen), streams, everywhere),
        out_shardings=(placed, everywhere),
        donate_argnums=0,
        keep_unused=True,  # what no step reads stays on the devices too, and plans count it
    )
