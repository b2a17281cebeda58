"""The complete config, and the checks across its sections."""

import dataclasses

import numpy as np

from lattejax.configuration.sections import (
    Checkpoints,
    Data,
    Evaluation,
    GenerationStage,
    Images,
    Mesh,
    Model,
    Profile,
    Stage,
    Tokenizer,
    check_one_of,
)
from lattejax.models.generation_config import GenerationConfig
from lattejax.models.latte_flow import ModelConfig
from lattejax.models.qwen2_vl import VLMConfig
from lattejax.ranges import Natural, Positive, Seed, check_ranges

DTYPES = ("float32", "bfloat16")
LEAST_MASS = 1e-5  # of the density of flow time, in a group's interval


@dataclasses.dataclass(frozen=True)
class Config:
    seed: Seed = 0
    dtype: str = "bfloat16"  # of the computation; or "float32", which master weights always use
    log_every: Positive = 100  # steps between lines of metrics
    most_skipped_steps: Natural = 100  # per stage, for a loss or gradients that are not finite; one more stops the run
    mesh: Mesh = Mesh()
    model: Model = Model()
    images: Images = Images()
    data: Data = Data()
    tokenizer: Tokenizer = Tokenizer()
    pretrain: Stage = Stage()  # the VLM, on questions about images
    train: GenerationStage = GenerationStage()  # the generation pathway, and in Blend the VLM's layers
    eval: Evaluation = Evaluation()
    checkpoint: Checkpoints = Checkpoints()
    profile: Profile = Profile()

    def __post_init__(self):
        check_ranges(self)
        check_one_of("dtype", self.dtype, DTYPES)
        try:
            _ = self.model_config  # runs its own checks
        except ValueError as error:
            raise ValueError(f"model.{error}") from error
        if self.mesh.expert != 1:
            if self.trains_answers or self.model.group_sizes:
                what = "model.variant='blend'" if self.trains_answers else "model.group_sizes"
                raise ValueError(f"mesh.expert={self.mesh.expert} must be 1 with {what}: its groups cannot be sharded")
            if self.model.num_groups % self.mesh.expert:
                raise ValueError(f"mesh.expert={self.mesh.expert} does not divide the {self.model.num_groups} groups")
        if self.train.interval_overlap and self.model.num_groups == 1:
            raise ValueError(
                f"train.interval_overlap={self.train.interval_overlap} has no effect with model.num_groups=1: a single "
                "interval has no neighbours"
            )
        if self.train.clip_by == "group" and (self.model.shared_ends or self.trains_answers):
            raise ValueError(
                "train.clip_by='group' needs groups that share no weights; set model.shared_ends=False, and "
                "model.variant='couple'"
            )
        groups, accumulation = self.model.num_groups if self.train.stratified else 1, self.train.accumulation
        if self.train.batch_size % (accumulation * groups):
            raise ValueError(
                f"train.batch_size={self.train.batch_size} must be a multiple of train.accumulation ({accumulation}) "
                f"times model.num_groups ({groups}), so that every group gets an equal share"
            )
        if self.trains_answers and self.train.answer_batch_size % accumulation:
            raise ValueError(
                f"train.answer_batch_size={self.train.answer_batch_size} must be a multiple of train.accumulation "
                f"({accumulation})"
            )
        if self.data.prompts == "pictures" and self.train.share_contexts:
            raise ValueError("data.prompts='pictures' makes every prompt different; set train.share_contexts=False")
        if self.train.init_from and (self.pretrain.init_from != self.train.init_from or self.pretrain.steps):
            raise ValueError(
                f"train.init_from={self.train.init_from!r} needs the VLM that its generation pathway was trained "
                "with; set pretrain.init_from to the same run, and pretrain.steps=0"
            )
        masses = self.model_config.generation.intervals.masses(self.train.flow_density)
        if np.min(masses) < LEAST_MASS:
            raise ValueError(
                f"train.density={self.train.density!r} leaves a group almost no flow times to train on: the groups' "
                f"shares of the flow times are {np.round(masses, 6).tolist()}"
            )

    @property
    def trains_answers(self) -> bool:
        """Whether the second stage also trains on questions, because it trains the weights that answer them."""
        return self.model_config.shares_layers

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(
            vlm=VLMConfig(self.model.text, self.model.vision),
            generation=GenerationConfig(
                text=self.model.text,
                latent_shape=self.data.latent_shape,
                num_groups=self.model.num_groups,
                group_sizes=self.model.group_sizes,
                interval_edges=self.model.interval_edges,
                residual_attention=self.model.residual_attention,
                residual_gate=self.model.residual_gate,
                replica_init=self.model.replica_init,
                latent_position=self.model.latent_position,
                conditioning=self.model.conditioning,
                prediction=self.model.prediction,
                shared_ends=self.model.shared_ends,
                patch_size=self.model.patch_size,
            ),
            variant=self.model.variant,
        )
