"""The first stage: language modelling of answers."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lattejax.configuration import Config
from lattejax.data.pipeline import Batches, Streams
from lattejax.data.prompts import question_batch
from lattejax.evaluation.protocol import Report, Subject
from lattejax.evaluation.registry import due, open_evaluators, take_scores
from lattejax.models import qwen2_vl
from lattejax.models.functional import Params
from lattejax.objectives.answers import AnswerLoss, weigh_answers
from lattejax.parallel import hosts, rules
from lattejax.parallel.rows import Rows
from lattejax.runs.data import open_data
from lattejax.runs.inference import inference_weights
from lattejax.runs.run import Run, open_vlm
from lattejax.runs.shapes import abstract_params
from lattejax.training.costs import TRAINING_PASSES, question_flops
from lattejax.training.layout import stage_rows
from lattejax.training.loop import StageRecipe
from lattejax.training.step import TrainState, make_train_step


def vlm_recipe(run: Run, key: jax.Array) -> StageRecipe:
    """Trains the VLM, from random weights or another run's, to answer questions about images."""
    config, stage, model = run.config, run.config.pretrain, run.config.model_config
    init_key, step_key = jax.random.split(key)
    rows = stage_rows(config)["pretrain"]
    loss = AnswerLoss(model, jnp.dtype(config.dtype), stage.remat, stage.unroll)

    source = open_data(config)
    scheduled = open_evaluators(config, source)

    def evaluate(state: TrainState) -> Report:
        def weights() -> Params:
            return inference_weights(config, {"vlm": state.average}, run.mesh)

        penalty = run.generation.repetition_penalty
        subject = Subject(config, source, run.encoder, run.mesh, weights, repetition_penalty=penalty)
        return take_scores(due(scheduled, "pretrain", int(hosts.fetch(state.step))), subject)

    return StageRecipe(
        name="pretrain",
        settings=stage,
        mesh=run.mesh,
        rows=rows,
        trained=abstract_params(config)["vlm"],
        init=lambda: first_vlm(config, init_key, run.mesh),
        step=make_train_step(stage, loss, rows, prepare=weigh_answers),
        key=step_key,
        frozen=None,
        batches=Streams(questions=question_batches(run, rows["questions"])),
        evaluate=evaluate,
        flops_per_example=TRAINING_PASSES * question_flops(config),
    )


def first_vlm(config: Config, key: jax.Array, mesh: Mesh) -> Params:
    """The first stage's initial weights: another run's VLM, converted weights, or random ones."""
    if config.pretrain.init_from:
        source = open_vlm(config.pretrain.init_from, mesh)
        return source.vlm() if isinstance(source, Run) else source.params("float32", mesh)
    placed = rules.shardings(mesh, abstract_params(config)["vlm"])
    return jax.jit(lambda key: qwen2_vl.init(config.model_config.vlm, key), out_shardings=placed)(key)


def question_batches(run: Run, rows: Rows) -> Batches:
    data, questions = run.config.data, open_data(run.config).questions("train", run.encoder)
    return Batches(
        questions,
        lambda records, positions: question_batch(
            run.encoder, records, data.answer_length, questions.bounds, data.answer_weights
        ),
        batch_size=rows.batch_size,
        seed=run.config.seed,
        threads=data.threads,
        rows=rows.of_process(run.mesh),
    )
