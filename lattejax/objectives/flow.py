"""Flow matching: mean squared error of velocities, each group on its own interval of flow time.

Axes: K group, b rows of one group's share, U prompts of a table, T token, C latent channel.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from lattejax.flow.densities import Density
from lattejax.flow.path import interpolate, target_velocity, velocity_towards
from lattejax.models import functional, generation, latte_flow, qwen2_vl
from lattejax.models.functional import Params
from lattejax.models.generation import Context
from lattejax.models.latte_flow import ModelConfig
from lattejax.models.layers import rows_of_one_group
from lattejax.models.qwen2_vl import Prompts
from lattejax.objectives.answers import Metrics, answer_loss


class Frozen(NamedTuple):
    """The frozen inputs of flow matching."""

    params: Params  # the untrained weights of the model that the loss needs, cast and stacked
    contexts: Context | None = None  # a table of captions' contexts, the empty prompt's last, if they never change
    captions: Prompts | None = None  # otherwise those captions, whose contexts are computed in each step
    unconditional: Prompts | None = None  # the empty prompt as a batch of one, if each row has its own prompt


class FlowRows(NamedTuple):
    """Rows to compute the loss of, without their flow times. Each group's own rows are [K, b], those of all groups [B].

    `caption_index` is the index of each row's context in a table; None, if each group has the contexts of its rows.
    """

    caption_index: Int[Array, "*rows"] | None
    latents: Float[Array, "*rows h w C"]
    noise: Float[Array, "*rows h w C"]


@dataclasses.dataclass(frozen=True)
class FlowLoss:
    """The second stage's loss: mean squared error of velocities; in Blend, also the answers' loss.

    A row's flow time, noise and prompt dropout are functions of its key. If stratified, each group has its own rows
    [K, b], whose t are drawn from the density restricted to the group's interval, or a wider one if intervals overlap;
    the loss is Σ P_k·loss_k, where P_k is the share of the density in the group's own interval. Otherwise rows are [B],
    t is drawn from the full density, every group runs every row, and only the owner's result counts: the same loss on
    average, at K times the cost.
    """

    config: ModelConfig
    density: Density
    stratified: bool
    prompt_dropout: float
    answer_weight: float
    dtype: jax.typing.DTypeLike
    remat: str
    unroll: bool
    overlap: float = 0.0  # how far groups' intervals reach into their neighbours', as a share of their length

    def __call__(
        self, trained: Params, frozen: Frozen, batch: dict[str, Any], keys: dict[str, Key[Array, "*rows"]]
    ) -> tuple[Array, Metrics]:
        params = self.assemble(trained, frozen)
        u, noise, dropped = self.draw(keys["images"])
        contexts, caption_index = self.read(params, frozen, batch["images"], dropped)
        rows = FlowRows(caption_index, batch["images"]["latents"], noise)
        weigh = self.of_shares if self.stratified else self.of_owners
        loss, per_group = weigh(params, contexts, rows, u)
        metrics = {"loss": loss, "loss_per_group": per_group}
        if "questions" in batch:
            answers = answer_loss(self.config.vlm, params["vlm"], batch["questions"], self.remat, self.unroll)
            metrics["answer_loss"] = answers
            loss = loss + self.answer_weight * answers
        return loss, metrics

    def assemble(self, trained: Params, frozen: Frozen) -> Params:
        """Returns the model's parameters in the dtype of the computation."""
        return functional.merge(functional.cast_floats(trained, self.dtype), frozen.params)

    def draw(self, keys: Key[Array, "*rows"]) -> tuple[Float[Array, "*rows"], Float[Array, "*rows h w C"], Array]:
        """Returns uniform draws for t, noise, and which prompts are dropped."""

        def row(key):
            for_t, for_noise, for_dropout = jax.random.split(key, 3)
            return (
                jax.random.uniform(for_t),
                jax.random.normal(for_noise, self.config.generation.latent_shape),
                jax.random.uniform(for_dropout) < self.prompt_dropout,
            )

        for _ in keys.shape:
            row = jax.vmap(row)
        return row(keys)

    def read(
        self, params: Params, frozen: Frozen, images: dict[str, Any], dropped: Array
    ) -> tuple[Context, Int[Array, "*rows"] | None]:
        """Returns a table of contexts and each row's index in it. If groups have their own rows, and rows their own
        prompts, returns each group's contexts [K, L, b, …] and None instead."""
        if "prompts" in images and dropped.ndim == 2:
            # Each group reads its own rows: on a mesh, nothing leaves the group's devices.
            prompts = jax.vmap(drop, in_axes=(0, None, 0))(images["prompts"], frozen.unconditional, dropped)
            with rows_of_one_group():
                return jax.vmap(lambda prompts: self.contexts(params["vlm"], prompts))(prompts), None
        if "prompts" in images:
            prompts = drop(images["prompts"], frozen.unconditional, dropped)
            return self.contexts(params["vlm"], prompts), jnp.arange(len(dropped))
        table = frozen.contexts
        if table is None:
            table = self.contexts(params["vlm"], frozen.captions)
        return table, jnp.where(dropped, table.mask.shape[0] - 1, images["caption"])

    def contexts(self, vlm: Params, prompts: Prompts) -> Context:
        """Returns stacked contexts."""
        vlm = qwen2_vl.unstack(vlm) if self.unroll else vlm
        contexts = latte_flow.read_prompts(self.config, vlm, prompts, self.remat)
        if self.unroll:
            contexts = contexts._replace(layers=jax.tree.map(lambda *layers: jnp.stack(layers), *contexts.layers))
        return contexts

    def of_shares(self, params: Params, contexts: Context, rows: FlowRows, u: Array) -> tuple[Array, Float[Array, "K"]]:
        """The loss and each group's loss, if every group runs its own rows."""
        t = self.intervals.draw(u, self.density, self.overlap)
        per_group = self.losses(params, contexts, *rows, t).mean(axis=1)
        return jnp.sum(per_group * self.intervals.masses(self.density)), per_group

    def of_owners(self, params: Params, contexts: Context, rows: FlowRows, u: Array) -> tuple[Array, Float[Array, "K"]]:
        """The loss and an unbiased estimate of each group's loss, if every group runs all rows and only the owner of t
        counts."""
        t = self.density.quantile(u)
        everywhere, t_everywhere = self.for_all_groups((rows, t))
        owned = self.intervals.owners(t) == jnp.arange(self.config.generation.num_groups)[:, None]
        losses = self.losses(params, contexts, *everywhere, self.intervals.clip(t_everywhere))
        shares = jnp.mean(jnp.where(owned, losses, 0), axis=1)
        return jnp.sum(shares), shares / self.intervals.masses(self.density)

    @property
    def intervals(self):
        return self.config.generation.intervals

    def for_all_groups(self, rows: Any) -> Any:
        """Repeats a tree of arrays [B, …] for each group, [K, B, …]."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.config.generation.num_groups, *x.shape)), rows)

    def losses(
        self,
        params: Params,
        contexts: Context,
        caption_index: Int[Array, "K b"] | None,
        latents: Float[Array, "K b h w C"],
        noise: Float[Array, "K b h w C"],
        t: Float[Array, "K b"],
    ) -> Float[Array, "K b"]:
        """Returns each row's mean squared error, for training and held-out rows."""
        x_t = interpolate(latents, noise, t)
        pathway = latte_flow.pathway(self.config, params)
        velocities = generation.group_velocities(
            self.config.generation, pathway, contexts, caption_index, x_t, t, remat=self.remat, unroll=self.unroll
        )
        target = target_velocity(latents, noise)
        if self.config.generation.prediction == "x":  # whose velocity counts some time as left, and so does its target
            target = velocity_towards(latents, x_t, t)
        return jnp.mean((velocities - target) ** 2, axis=(2, 3, 4))

    def held_out(
        self, trained: Params, frozen: Frozen, images: dict[str, Any], index: Int[Array, "b"], total: Int[Array, ""]
    ) -> Float[Array, "K b"]:
        """Returns each group's losses on some of `total` held-out rows.

        Flow times and noise depend only on a row's `index`: t is the midpoint of one of `total` equal cells of the
        group's interval, whatever the density of training. So the mean does not depend on how rows are split into
        batches.
        """
        params, latents = self.assemble(trained, frozen), images["latents"]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), index)
        noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:]))(keys)
        contexts, caption_index = self.read(params, frozen, images, jnp.zeros(len(latents), bool))
        rows, u = self.for_all_groups((FlowRows(caption_index, latents, noise), (index + 0.5) / total))
        return self.losses(params, contexts, *rows, self.intervals.draw(u))


def drop(prompts: Prompts, unconditional: Prompts, dropped: Array) -> Prompts:
    """Replaces the prompts of dropped rows by the empty prompt, without images."""

    def either(prompt, empty):
        return jnp.where(dropped.reshape(-1, *[1] * (prompt.ndim - 1)), empty, prompt)

    texts = jax.tree.map(either, prompts._replace(images=None), unconditional)
    if prompts.images is None:
        return texts
    return texts._replace(images=prompts.images._replace(index=either(prompts.images.index, -1)))


def norms_per_group(config: ModelConfig, gradients: Params) -> Float[Array, "K"]:
    """The norm of the gradient of each group's own weights: its layers, and its ends unless groups share them."""

    def squares(part):  # by layer, or by group
        return sum(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(part))

    pathway, generation = latte_flow.pathway(config, gradients), config.generation
    layers, ends = squares(pathway["experts"]), squares(pathway.get("ends", {}))
    if not generation.group_sizes:
        return jnp.sqrt(jnp.sum(layers.reshape(generation.num_groups, -1), axis=1) + ends)
    return jnp.sqrt(jnp.stack([jnp.sum(layers[own]) for own in generation.layers_of]) + ends)


def clip_per_group(config: ModelConfig, most: float) -> optax.GradientTransformation:
    """Clips the gradient of each group's own weights by its own norm. Couple with own ends: then it has no other."""
    sizes = [own.stop - own.start for own in config.generation.layers_of]

    def clip(gradients: Params, params: Params) -> Params:
        scale = jnp.minimum(1, most / norms_per_group(config, gradients))
        scales = {"ends": scale, "experts": jnp.repeat(scale, np.asarray(sizes), total_repeat_length=sum(sizes))}

        def clipped(name):
            return jax.tree.map(lambda x: x * scales[name].reshape(-1, *[1] * (x.ndim - 1)), gradients[name])

        return {name: clipped(name) for name in gradients}

    return optax.stateless(clip)
