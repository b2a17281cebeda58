"""The arrangement of rows in each stage's batches, and the check that rows and weights fit a mesh."""

import dataclasses

from jax.sharding import AbstractMesh, Mesh

from lattejax.configuration import Config
from lattejax.errors import UserError
from lattejax.parallel import rules
from lattejax.parallel.rows import Rows
from lattejax.runs.shapes import abstract_params


def stage_rows(config: Config) -> dict[str, dict[str, Rows]]:
    """How the rows of each stage's streams of batches are arranged."""
    pretrain, train = config.pretrain, config.train
    groups = config.model.num_groups if train.stratified else None
    streams = {"images": Rows(train.batch_size, train.accumulation, groups)}
    if config.trains_answers:
        streams["questions"] = Rows(train.answer_batch_size, train.accumulation)
    return {"pretrain": {"questions": Rows(pretrain.batch_size, pretrain.accumulation)}, "train": streams}


def check_mesh(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises `UserError` unless weights and batches can be sharded over the mesh."""
    names = {"questions": "answer_batch_size", "images": "batch_size"}
    try:
        if mesh.shape["expert"] != config.mesh.expert:  # it was -1, so the config could not check it
            dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh.shape))
        for stage, streams in stage_rows(config).items():
            for stream, rows in streams.items():
                name = "batch_size" if stage == "pretrain" else names[stream]
                if stage == "train" or config.pretrain.steps:
                    rows.check(mesh, f"{stage}.{name}")
        tensor = mesh.shape["tensor"]
        for tower in ("text", "vision"):
            heads = getattr(config.model, tower).num_heads
            if heads % tensor:
                raise ValueError(f"mesh.tensor={tensor} does not divide the {heads} query heads of model.{tower}")
        rules.shardings(mesh, abstract_params(config))
    except ValueError as error:
        raise UserError(f"config.mesh does not fit: {error}") from error
