"""The complete LaTtE-Flow model: a VLM that reads, a generation pathway that draws, and the connection between them.

LaTtE-Flow (arXiv 2506.06952) has two variants. How their weights differ is in this file: `VARIANTS`, `init` and
`pathway`. All other code checks `ModelConfig.shares_layers`, which decides

- whether a second stream of batches trains answers;
- whether contexts can be computed in advance;
- which weights answer once the second stage has begun.

The variants:

- Couple: the VLM is frozen. Each generation layer has a trained replica of the VLM layer at its depth. Prompts never
  attend to image tokens, so their contexts depend on nothing that is trained, and are computed once.
- Blend: image tokens pass through the VLM's own layers, which are trained on flow matching and language modelling
  together; flow matching also trains them through the contexts. Only the conditioning (modulation, norms, gates) and
  both ends belong to generation. The text path is the VLM's, unchanged. The paper leaves open what exactly is shared;
  we share the layers of the language model, and leave its vocabulary and the vision tower frozen.

The pathway attends to a prompt through the VLM's keys and values at each layer: the ordinary KV cache.

Parameters are one tree: `vlm/text`, `vlm/vision`, `embedding`, `time`, `experts`, `head`; the pathway's ends may be in
`ends` instead, see `generation.init`.
"""

import dataclasses

import jax

from lattejax.models import functional, generation, qwen2_vl
from lattejax.models.functional import Params
from lattejax.models.generation import Context
from lattejax.models.generation_config import GenerationConfig
from lattejax.models.layers import Layers
from lattejax.models.qwen2_vl import Prompts, VLMConfig

# The pathway's parts, and the parameters that each variant's second stage trains: patterns for the start of a path.
PATHWAY = ("embedding", "time", "experts", "head", "ends")
VARIANTS = {
    "couple": tuple(f"{part}/" for part in PATHWAY),
    "blend": (*(f"{part}/" for part in PATHWAY), "vlm/text/layers/"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vlm: VLMConfig
    generation: GenerationConfig
    variant: str = "couple"

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} is unknown; use one of {list(VARIANTS)}")
        if self.shares_layers and self.generation.replica_init != "vlm":
            raise ValueError(
                f"replica_init={self.generation.replica_init!r} needs replicas, and variant={self.variant!r} has none; "
                "use 'vlm'"
            )

    @property
    def shares_layers(self) -> bool:
        """Whether image tokens pass through the VLM's own layers."""
        return self.variant == "blend"


def init(config: ModelConfig, vlm: Params, key: jax.Array) -> Params:
    """Returns all parameters, stacked: those of `vlm`, and a newly initialized generation pathway."""
    layers = None if config.shares_layers else vlm["text"]["layers"]
    return {"vlm": vlm, **generation.init(config.generation, layers, key)}


def pathway(config: ModelConfig, params: Params) -> Params:
    """Returns the generation pathway's weights, with a decoder in each layer: its own, or the VLM's.

    `params` are stacked or have a list of layers; a tree of gradients works too.
    """
    own = {name: params[name] for name in PATHWAY if name in params}
    if not config.shares_layers:
        return own
    experts, shared = params["experts"], params["vlm"]["text"]["layers"]
    return own | {"experts": Layers(experts).with_part("decoder", shared)}


def unstack(params: Params) -> Params:
    """The same weights with a tree for each layer (see `models.layers`); parts may be missing."""
    unstacked = dict(params)
    if "vlm" in params:
        unstacked["vlm"] = qwen2_vl.unstack(params["vlm"])
    if "experts" in params:
        unstacked["experts"] = Layers(params["experts"]).unstack()
    return unstacked


def split_trained(config: ModelConfig, params: Params) -> tuple[Params, Params]:
    """Splits parameters into those that the second stage trains, and the frozen rest."""
    return functional.partition(params, VARIANTS[config.variant])


PROMPTS_AT_A_TIME = 128  # read together, so that a thousand prompts do not need the activations of a thousand


def read_prompts(config: ModelConfig, vlm: Params, prompts: Prompts, remat: str = "none") -> Context:
    """Returns the prompts' contexts at all L layers: stacked, or a list if the VLM's layers are a list."""
    _, layers = qwen2_vl.forward(config.vlm, vlm, prompts, remat)
    return Context(layers, prompts.mask, qwen2_vl.next_positions(prompts))
