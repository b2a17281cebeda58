"""The two losses: flow matching for the generation pathway, and language modelling of answers for the VLM.

A loss takes (trained parameters, frozen inputs, batch, keys) and returns a scalar and a dict of metrics. Rows of
`batch` and `keys` stand on the leading axis; a loss is a mean over rows, so that the losses of micro-batches average to
that of their batch.

Axes: K group, b rows of one group's share, U prompts of a table, T token, C latent channel.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from lattejax.flow.intervals import Intervals
from lattejax.flow.path import interpolate, target_velocity
from lattejax.models import couple, functional, generation, qwen2_vl
from lattejax.models.couple import ModelConfig
from lattejax.models.functional import Params
from lattejax.models.generation import Context
from lattejax.models.qwen2_vl import Prompts

Metrics = dict[str, Array]


# ---- The VLM: answers to questions


@dataclasses.dataclass(frozen=True)
class AnswerLoss:
    """Cross-entropy of the answers' tokens, and of no others."""

    config: ModelConfig
    dtype: jnp.dtype
    remat: str
    unroll: bool

    def __call__(self, vlm: Params, frozen: None, batch: dict[str, Any], keys: Any) -> tuple[Array, Metrics]:
        del frozen, keys
        prompts: Prompts = batch["prompts"]
        params = functional.cast_floats(vlm, self.dtype)
        if self.unroll:
            params = qwen2_vl.unstack(params)
        hidden, _ = qwen2_vl.forward(self.config.vlm, params, prompts, self.remat)
        logits = qwen2_vl.logits(self.config.vlm, params, hidden[:, :-1]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, prompts.input_ids[:, 1:])
        loss = jnp.mean(jnp.sum(losses * batch["target_weights"][:, 1:], axis=1))
        return loss, {"loss": loss}


# ---- The generation pathway: flow matching, stratified over the groups


class Frozen(NamedTuple):
    """What flow matching reads and does not train.

    Either `contexts` is a table of the captions' contexts, the empty prompt's last, or `vlm` is there to make the
    contexts of each batch, with `unconditional`, the empty prompt, as a batch of one.
    """

    contexts: Context | None = None
    vlm: Params | None = None
    unconditional: Prompts | None = None


@dataclasses.dataclass(frozen=True)
class FlowLoss:
    """Mean squared error of each group's velocity on its own share of the batch, at flow times of its own interval.

    Rows fall to the groups in contiguous blocks. A row's flow time, noise and prompt dropout are functions of its key.
    """

    config: ModelConfig
    intervals: Intervals
    prompt_dropout: float
    dtype: jnp.dtype
    remat: str
    unroll: bool

    def __call__(
        self, params: Params, frozen: Frozen, batch: dict[str, Any], keys: Key[Array, "rows"]
    ) -> tuple[Array, Metrics]:
        groups = self.intervals.num_groups
        keys, latents = (x.reshape(groups, -1, *x.shape[1:]) for x in (keys, batch["latents"]))
        u, noise, dropped = self.draw(keys)
        contexts = self.contexts(frozen, batch, dropped)
        losses = self.losses(params, contexts, latents, noise, self.intervals.draw(u))
        per_group = losses.mean(axis=1)
        loss = jnp.mean(per_group * self.intervals.weights())
        return loss, {"loss": loss, "loss_per_group": per_group}

    def draw(self, keys: Key[Array, "K b"]) -> tuple[Float[Array, "K b"], Float[Array, "K b h w C"], Array]:
        """Returns uniform draws for t, noise, and which prompts are dropped."""

        def row(key):
            for_t, for_noise, for_dropout = jax.random.split(key, 3)
            return (
                jax.random.uniform(for_t),
                jax.random.normal(for_noise, self.config.generation.latent_shape),
                jax.random.uniform(for_dropout) < self.prompt_dropout,
            )

        return jax.vmap(jax.vmap(row))(keys)

    def contexts(self, frozen: Frozen, batch: dict[str, Any], dropped: Array) -> Context:
        """Returns every group's share of contexts, [K, …]."""
        if frozen.contexts is not None:
            unconditional = frozen.contexts.mask.shape[0] - 1
            index = jnp.where(dropped, unconditional, batch["caption"].reshape(dropped.shape))
            return couple.share_contexts(self.config, frozen.contexts, index)

        def drop(prompt, empty):
            return jnp.where(dropped.reshape(-1, *[1] * (prompt.ndim - 1)), empty, prompt)

        prompts = jax.tree.map(drop, batch["prompts"], frozen.unconditional)
        table = couple.read_prompts(self.config, frozen.vlm, prompts)
        return couple.share_contexts(self.config, table, jnp.arange(dropped.size).reshape(dropped.shape))

    def losses(
        self,
        params: Params,
        contexts: Context,
        latents: Float[Array, "K b h w C"],
        noise: Float[Array, "K b h w C"],
        t: Float[Array, "K b"],
    ) -> Float[Array, "K b"]:
        """Returns each row's mean squared error."""
        x_t = interpolate(latents, noise, t)
        params, contexts = functional.cast_floats((params, contexts), self.dtype)
        velocities = generation.group_velocities(
            self.config.generation, params, contexts, x_t, t, remat=self.remat, unroll=self.unroll
        )
        return jnp.mean((velocities - target_velocity(latents, noise)) ** 2, axis=(2, 3, 4))

    def held_out(
        self, params: Params, table: Context, latents: Float[Array, "b h w C"], captions: Int[Array, "b"]
    ) -> Float[Array, "K"]:
        """Returns each group's loss on held-out rows, at fixed flow times and noise: the midpoints of b equal cells of
        the group's interval, and noise by the row's number."""
        groups, rows = self.intervals.num_groups, len(latents)
        noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(jax.random.key(0), row), latents.shape[1:]))(
            jnp.arange(rows)
        )
        u = (jnp.arange(rows) + 0.5) / rows
        latents, noise, u, captions = (jnp.broadcast_to(x, (groups, *x.shape)) for x in (latents, noise, u, captions))
        contexts = couple.share_contexts(self.config, table, captions)
        return self.losses(params, contexts, latents, noise, self.intervals.draw(u)).mean(axis=1)


def norms_per_group(num_groups: int, gradients: Params) -> Float[Array, "K"]:
    """The norm of the gradient of each group's own layers."""
    squares = [
        jnp.sum(jnp.square(leaf.reshape(num_groups, -1)), axis=1) for leaf in jax.tree.leaves(gradients["experts"])
    ]
    return jnp.sqrt(sum(squares))
