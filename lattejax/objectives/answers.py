"""Language modelling of answers: the loss of the VLM, and in Blend of the layers that it shares."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lattejax.models import functional, qwen2_vl
from lattejax.models.functional import Params
from lattejax.models.latte_flow import ModelConfig
from lattejax.models.qwen2_vl import Prompts, VLMConfig

Metrics = dict[str, Array]


def weigh_answers(batch: dict[str, Any]) -> dict[str, Any]:
    """Scales the questions' token weights so that the mean over rows of the weighted losses is the weighted mean over
    all answer tokens of the batch, over all processes and micro-batches, whatever the lengths of the answers."""
    if "questions" not in batch:
        return batch
    weights = batch["questions"]["target_weights"]
    rows = math.prod(weights.shape[:-1])
    return batch | {"questions": batch["questions"] | {"target_weights": weights * (rows / jnp.sum(weights))}}


def answer_loss(
    config: VLMConfig, vlm: Params, questions: dict[str, Any], remat: str, unroll: bool
) -> Float[Array, ""]:
    """Cross-entropy of the answer tokens only. With `remat` other than "none", logits are recomputed too."""
    prompts: Prompts = questions["prompts"]
    vlm = qwen2_vl.unstack(vlm) if unroll else vlm
    hidden, _ = qwen2_vl.forward(config, vlm, prompts, remat)
    hidden, targets = hidden[:, :-1], prompts.input_ids[:, 1:]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    if remat == "none":
        losses = cross_entropy(qwen2_vl.logits(config, vlm, hidden).astype(jnp.float32), targets)
    else:
        losses = qwen2_vl.map_logits(config, vlm, hidden, targets, cross_entropy)
    return jnp.mean(jnp.sum(losses * questions["target_weights"][:, 1:], axis=1))


@dataclasses.dataclass(frozen=True)
class AnswerLoss:
    """The first stage's loss, which trains only the VLM."""

    config: ModelConfig
    dtype: jax.typing.DTypeLike
    remat: str
    unroll: bool

    def __call__(self, vlm: Params, frozen: None, batch: dict[str, Any], keys: Any) -> tuple[Array, Metrics]:
        del frozen, keys
        vlm = functional.cast_floats(vlm, self.dtype)
        loss = answer_loss(self.config.vlm, vlm, batch["questions"], self.remat, self.unroll)
        return loss, {"loss": loss}
