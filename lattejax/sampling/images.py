"""Drawing images: one context pass for all prompts, then compiled loops, each over steps of one group.

The noise of an image is a function of only (seed, sample index), so a set of images does not depend on how it is split
into batches.

Axes: B batch, U prompts with the empty one last, C latent channel.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

from lattejax.data.prompts import EncodedPrompt, PromptEncoder
from lattejax.flow.path import guide
from lattejax.flow.schedule import Sampling, Segment, split_steps
from lattejax.flow.solvers import SOLVERS
from lattejax.models import generation, latte_flow
from lattejax.models.autoencoders import Autoencoder
from lattejax.models.conditioning import Step
from lattejax.models.functional import Params
from lattejax.models.generation import Context
from lattejax.models.latte_flow import ModelConfig
from lattejax.parallel import hosts, rules
from lattejax.parallel.memory import call_checked
from lattejax.parallel.mesh import batches_of, one_device
from lattejax.parallel.rows import Rows
from lattejax.runs.inference import inference_weights
from lattejax.runs.run import Run
from lattejax.sampling.padding import bucket, padded

read_prompts = jax.jit(latte_flow.read_prompts, static_argnames=("config", "remat"))


def sample_noise(
    seed: int | Int[Array, ""] | UInt32[Array, ""], samples: Int[Array | np.ndarray, "B"], shape: tuple[int, int, int]
) -> Float[Array, "B h w C"]:
    """Standard normal noise for the given sample indices."""
    return _noise(jax.random.key(seed), samples, shape)


@functools.partial(jax.jit, static_argnames="shape")
def _noise(key: Key[Array, ""], samples: Int[Array, "B"], shape: tuple[int, int, int]) -> Float[Array, "B h w C"]:
    return jax.vmap(lambda sample: jax.random.normal(jax.random.fold_in(key, sample), shape))(samples)


@functools.partial(jax.jit, static_argnames=("config", "segments"), keep_unused=True)  # as in train steps
def draw_latents(
    config: ModelConfig,
    pathway: Params,
    contexts: Context,
    prompts: Int[Array, "B"],
    unconditional: Int[Array, "B"],
    noise: Float[Array, "B h w C"],
    guidance: Float[Array, ""],
    *,
    segments: tuple[Segment, ...],
) -> Float[Array, "B h w C"]:
    """Integrates the flow from noise to latents.

    Conditional and unconditional velocities are computed in one batch of 2·B rows, by the group that owns the step. The
    two rows of an image are adjacent, so that on a mesh they are on one device.

    Args:
      config: the model's geometry.
      pathway: the generation pathway (`latte_flow.pathway`), with its experts as a list of L layers.
      contexts: the contexts of U prompts at all L layers, as a list.
      prompts: the index of each row's prompt.
      unconditional: the index of the prompt to guide each row away from, empty or negative.
      noise: the rows at t = 0.
      guidance: the guidance scale s in v_uncond + s·(v_cond − v_uncond).
      segments: the steps, see `split_steps`; those without guidance skip the unconditional pass.
    """
    x = noise
    for segment in segments:
        rows = jnp.stack([prompts, unconditional], axis=1).ravel() if segment.guided else prompts
        own, context = generation.of_group(config.generation, pathway, contexts, rows, segment.group)

        def velocity(x, modulations, guided=segment.guided, own=own, context=context):
            if not guided:
                return generation.velocity(config.generation, own, context, x, modulations)
            both = generation.velocity(config.generation, own, context, jnp.repeat(x, 2, axis=0), modulations)
            return guide(*rearrange(both, "(B two) h w C -> two B h w C", two=2), guidance)

        # Computed before the loop, so that its steps need not read the weights of time embedding and modulations.
        condition = functools.partial(generation.condition, config.generation, own)
        conditions = jax.vmap(lambda start, end, of=condition: of(Step(start[None], end[None])))
        x = SOLVERS[segment.solver](velocity, conditions, x, segment.steps)
    return x


@functools.partial(jax.jit, static_argnames="autoencoder")
def decode_images(
    autoencoder: Autoencoder, decoder: Params, latents: Float[Array, "B h w C"]
) -> UInt8[Array, "B H W 3"]:
    """Decodes latents and quantises them once: clip(127.5·x + 128), rounded down.

    At the highest matmul precision: an accelerator's default moves FIDs in their second digit.
    """
    with jax.default_matmul_precision("highest"):
        images = autoencoder.decode(decoder, latents)
    return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)


class ImageSampler:
    """Draws images from prompts; commands, evaluation and training all use this sampler.

    Args:
      config: the model's geometry.
      autoencoder: decodes the latents.
      encoder: the prompt encoder.
      params: the complete model's weights, a tree for each layer (`latte_flow.unstack`).
      decoder: the weights of the autoencoder's decoder.
      mesh: the devices that hold the weights and share the images; None: one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        autoencoder: Autoencoder,
        encoder: PromptEncoder,
        params: Params,
        decoder: Params,
        mesh: Mesh | None = None,
    ):
        self.config, self.autoencoder, self.encoder = config, autoencoder, encoder
        self.mesh = one_device() if mesh is None else mesh
        self.vlm = params["vlm"]
        self.pathway = latte_flow.pathway(config, params)
        self.decoder = rules.place(self.mesh, decoder, axes=())

    @classmethod
    def of(cls, run: Run, params: Params, autoencoder: str = "") -> "ImageSampler":
        """The sampler of a run with the given weights, e.g. during training; for `autoencoder` see `load`."""
        stored = run.open_autoencoder(autoencoder)
        weights, decoder = inference_weights(run.config, params, run.mesh), stored.weights("decoder")
        return cls(run.config.model_config, stored.autoencoder, run.encoder, weights, decoder, run.mesh)

    @classmethod
    def load(cls, workdir: epath.PathLike, autoencoder: str = "", mesh: Mesh | None = None) -> "ImageSampler":
        """Reads a run's average weights.

        Args:
          workdir: a run's directory, or an export.
          autoencoder: the current path of the run's autoencoder; empty: the path in the run's config.
          mesh: the devices to draw on; None: one device.

        Raises:
          UserError: there is no run, it has no checkpoint of the pathway, or the autoencoder differs.
        """
        run = Run.open(workdir, mesh)
        return cls.of(run, run.params(run.config.dtype), autoencoder)

    def read(self, prompts: Sequence[EncodedPrompt]) -> Context:
        """Returns the contexts of the prompts and, last, of the empty prompt.

        Their lengths and their number are rounded up, the number with more empty prompts, so that other prompts use the
        same compiled programs.
        """
        empty = [self.encoder.unconditional()] * (bucket(len(prompts) + 1) - len(prompts))
        prompts, size = [*prompts, *empty], latte_flow.PROMPTS_AT_A_TIME
        parts = [
            read_prompts(self.config, self.vlm, padded(self.encoder, prompts[start : start + size], among=prompts))
            for start in range(0, len(prompts), size)
        ]
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *each: jnp.concatenate(each), *parts)

    def __call__(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: Sampling,
        *,
        images_per_prompt: int,
        batch_size: int,
        seed: int = 0,
        negative: Sequence[EncodedPrompt] = (),
    ) -> np.ndarray:
        """Returns uint8 images [prompts · images_per_prompt, H, W, 3], in the prompts' order.

        Args:
          prompts: what to draw, see `PromptEncoder.drawing`.
          sampling: the steps, guidance and solver.
          images_per_prompt: the number of images for each prompt.
          batch_size: images per batch, rounded up so that every device draws the same number.
          seed: the seed of the noise.
          negative: for each prompt, the prompt to guide away from; empty: the empty prompt for all.

        Raises:
          ValueError: there are negative prompts, but not one for each prompt.
          UserError: a batch needs more memory than a device has.
        """
        if negative and len(negative) != len(prompts):
            raise ValueError(f"there are {len(negative)} negative prompts for {len(prompts)} prompts")
        contexts = self.read([*prompts, *negative])
        empty = contexts.mask.shape[0] - 1
        total, batches = len(prompts) * images_per_prompt, []
        for samples in batches_of(total, batch_size, self.mesh):
            rows = samples // images_per_prompt
            unconditional = rows + len(prompts) if negative else np.full_like(rows, empty)
            batches.append(self.draw(contexts, rows, unconditional, samples, sampling, seed))
        return np.concatenate(hosts.fetch(batches))[:total]

    def draw(
        self,
        contexts: Context,
        prompts: Int[np.ndarray, "B"],
        unconditional: Int[np.ndarray, "B"],
        samples: Int[np.ndarray, "B"],
        sampling: Sampling,
        seed: int,
    ) -> UInt8[Array, "B H W 3"]:
        """Draws one batch, and returns it on the mesh; B is a multiple of the mesh's rows.

        Args:
          contexts: what `read` returned.
          prompts: each row's prompt among the contexts.
          unconditional: each row's prompt to guide away from.
          samples: the samples' indices, from which, with `seed`, comes their noise.
          sampling: the steps, guidance and solver.
          seed: the seed of the noise.
        """
        segments = split_steps(self.config.generation.intervals, sampling)
        what = f"drawing with a batch size of {len(samples):,}"
        samples, rows, unconditional = Rows.place_flat(self.mesh, (samples, prompts, unconditional))
        noise = sample_noise(seed, samples, self.config.generation.latent_shape)
        inputs = self.config, self.pathway, contexts, rows, unconditional, noise, sampling.guidance
        latents = call_checked(draw_latents, what, *inputs, segments=segments)
        return call_checked(decode_images, what, self.autoencoder, self.decoder, latents)
