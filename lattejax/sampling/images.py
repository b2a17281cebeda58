"""Drawing images: one context pass for all prompts, then K compiled loops, each over the steps of one group.

The noise of an image is a function of (seed, sample index) alone, so a set of images does not depend on how it is cut
into batches.

Axes: B batch, U prompts with the empty one last, C latent channel.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from lattejax.data.prompts import PromptEncoder
from lattejax.errors import UserError
from lattejax.flow.intervals import Intervals, Schedule
from lattejax.flow.path import guide
from lattejax.flow.solvers import euler
from lattejax.models import couple, functional, generation
from lattejax.models.couple import ModelConfig
from lattejax.models.functional import Params
from lattejax.models.generation import Context

read_prompts = jax.jit(couple.read_prompts, static_argnames="config")


def sample_noise(
    seed: int | Int[Array, ""], samples: Int[Array, "B"], shape: tuple[int, int, int]
) -> Float[Array, "B h w C"]:
    """Standard normal noise for the given sample indices."""
    key = jax.random.key(seed)
    return jax.vmap(lambda sample: jax.random.normal(jax.random.fold_in(key, sample), shape))(samples)


@functools.partial(jax.jit, static_argnames=("config", "schedule", "guided"))
def draw_latents(
    config: ModelConfig,
    params: Params,
    contexts: Context,
    prompts: Int[Array, "B"],
    noise: Float[Array, "B h w C"],
    guidance: Float[Array, ""],
    *,
    schedule: Schedule,
    guided: bool,
) -> Float[Array, "B h w C"]:
    """Integrates the flow from noise to latents.

    Conditional and unconditional velocities come out of one batch of 2·B rows, both from the group that owns the step.

    Args:
      config: the model's geometry.
      params: the generation pathway, its experts a list of L layers.
      contexts: of U prompts at all L layers, as a list, the empty prompt last.
      prompts: each row's prompt.
      noise: where the rows start, at t = 0.
      guidance: the guidance scale s in v_uncond + s·(v_cond − v_uncond).
      schedule: the steps of each group.
      guided: False skips the unconditional pass, for a scale of 1.
    """
    rows = jnp.concatenate([prompts, jnp.full_like(prompts, contexts.mask.shape[0] - 1)]) if guided else prompts
    x = noise
    for group, steps in enumerate(schedule):
        if not steps:
            continue
        own = params | {"experts": generation.group_layers(config.generation, params["experts"], group)}
        context = couple.group_context(config, contexts, group, rows)

        def velocity(x, t, own=own, context=context):
            if not guided:
                return generation.velocity(config.generation, own, context, x, t[None])
            both = generation.velocity(config.generation, own, context, jnp.concatenate([x, x]), t[None])
            return guide(*jnp.split(both, 2), guidance)

        x = euler(velocity, x, steps)
    return x


@functools.partial(jax.jit, static_argnames="autoencoder")
def decode_images(autoencoder: Any, latents: Float[Array, "B h w C"]) -> UInt8[Array, "B H W 3"]:
    """Decodes latents and quantises once: clip(127.5·x + 128), rounded down."""
    return jnp.clip(127.5 * autoencoder.decode(latents) + 128, 0, 255).astype(jnp.uint8)


class ImageSampler:
    """Draws images from captions: the one sampler, for the doors, for evaluation and during training.

    Args:
      config: the model's geometry.
      autoencoder: what decodes the latents.
      encoder: what turns captions into prompts.
      vlm: the VLM's weights, a tree for each layer (`qwen2_vl.unstack`).
    """

    def __init__(self, config: ModelConfig, autoencoder: Any, encoder: PromptEncoder, vlm: Params):
        self.config, self.autoencoder, self.encoder = config, autoencoder, encoder
        self.vlm = vlm
        self.intervals = Intervals.equal(config.generation.num_groups)

    def read(self, captions: Sequence[str]) -> Context:
        """Returns the contexts of the captions and, last, of the empty prompt."""
        for caption in captions:
            if not caption.strip():
                raise UserError("a prompt is empty; say what to draw")
        encoded = [self.encoder.drawing(caption) for caption in (*captions, "")]
        return read_prompts(self.config, self.vlm, self.encoder.batch(encoded))

    def __call__(
        self,
        generation_params: Params,
        captions: Sequence[str],
        *,
        images_per_caption: int,
        num_steps: int,
        guidance: float,
        seed: int,
        batch_size: int,
    ) -> np.ndarray:
        """Returns uint8 images [captions · images_per_caption, H, W, 3], in the captions' order.

        Args:
          generation_params: the pathway's weights, its experts stacked on L.
          captions: what to draw.
          images_per_caption: how many of each.
          num_steps: sampling steps, dealt out to the groups by their intervals.
          guidance: guidance scale; 1 is none.
          seed: of the noise.
          batch_size: images drawn at a time.
        """
        contexts = self.read(captions)
        params = generation_params | {"experts": functional.unstack(generation_params["experts"])}
        total = len(captions) * images_per_caption
        batches = []
        for start in range(0, total, batch_size):
            # The last batch is filled up, so that every call has one shape, and cut below.
            samples = np.minimum(np.arange(start, start + min(batch_size, total)), total - 1)
            latents = draw_latents(
                self.config,
                params,
                contexts,
                samples // images_per_caption,
                sample_noise(seed, samples, self.config.generation.latent_shape),
                guidance,
                schedule=self.intervals.schedule(num_steps),
                guided=guidance != 1,
            )
            batches.append(decode_images(self.autoencoder, latents))
        return np.concatenate(batches)[:total]
