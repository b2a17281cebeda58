"""One optimizer step: the same numbers whichever way it is cut, and only what is to be trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lattejax.data import digits
from lattejax.data.prompts import question_batch
from lattejax.flow.intervals import Intervals
from lattejax.models import couple, qwen2_vl
from lattejax.sampling.images import read_prompts
from lattejax.training.objectives import AnswerLoss, FlowLoss, Frozen, norms_per_group
from lattejax.training.step import init_state, learning_rate, make_train_step
from tests.helpers import encoder_for, randomize, tiny_config

CONFIG = tiny_config()
ENCODER = encoder_for(CONFIG)
VLM = qwen2_vl.init(CONFIG.model_config.vlm, jax.random.key(0))
PARAMS = randomize(couple.init_generation(CONFIG.model_config, VLM, jax.random.key(1)), scale=0.1)
PROMPTS = ENCODER.batch([ENCODER.drawing(text) for text in (*digits.CAPTIONS, "")], CONFIG.data.prompt_length)
TABLE = read_prompts(CONFIG.model_config, VLM, PROMPTS)


def flow_loss(dtype=jnp.float32, **overrides) -> FlowLoss:
    settings = dict(prompt_dropout=0.4, remat="none", unroll=False) | overrides
    return FlowLoss(CONFIG.model_config, Intervals.equal(2), dtype=dtype, **settings)


def batch(rows: int = 8) -> dict:
    source = digits.CaptionedImages("train", CONFIG.autoencoder)
    return {"latents": source.latents[:rows], "caption": source.labels[:rows]}


def one_step(loss=None, frozen=None, inputs=None, **overrides):
    stage = tiny_config(**overrides).train
    step = make_train_step(
        stage,
        loss or flow_loss(),
        num_groups=2,
        gradient_metrics=lambda g: {"grad_norm_per_group": norms_per_group(2, g)},
    )
    frozen = Frozen(contexts=TABLE) if frozen is None else frozen
    inputs = batch() if inputs is None else inputs
    return jax.jit(step)(init_state(stage, PARAMS), frozen, inputs, jax.random.key(5))


def test_micro_batches_add_up_to_the_batch():
    """Same rows, same draws, same groups; float32 sums in another order."""
    (_, whole), (_, cut) = one_step(), one_step(train__accumulation=4)
    for name in whole:
        np.testing.assert_allclose(whole[name], cut[name], rtol=1e-5, err_msg=name)


def test_shared_contexts_equal_contexts_of_each_batch():
    """With prompt dropout in both: the gathered table against reading the batch's own prompts."""
    rows = batch()
    prompts = jax.tree.map(lambda x: x[rows["caption"]], PROMPTS)
    empty = jax.tree.map(lambda x: x[-1:], PROMPTS)
    _, shared = one_step()
    _, own = one_step(frozen=Frozen(vlm=VLM, unconditional=empty), inputs=rows | {"prompts": prompts})
    for name in shared:
        np.testing.assert_allclose(shared[name], own[name], rtol=1e-5, err_msg=name)


def test_dropped_prompts_are_the_empty_prompt():
    captions_do_not_matter = []
    for captions in (np.zeros(8, np.int32), np.full(8, 7, np.int32)):
        loss = flow_loss(prompt_dropout=1.0)
        _, metrics = one_step(loss, inputs=batch() | {"caption": captions})
        captions_do_not_matter.append(float(metrics["loss"]))
    assert captions_do_not_matter[0] == captions_do_not_matter[1]


def test_every_group_trains_on_its_own_share_alone():
    """Rows fall to groups in contiguous blocks: the first half moves group 0's layers, the second group 1's."""
    loss, rows = flow_loss(prompt_dropout=0.0), batch()
    keys = jax.random.split(jax.random.key(0), 8)

    def group_loss(params, group):
        return loss(params, Frozen(contexts=TABLE), rows, keys)[1]["loss_per_group"][group]

    for group in (0, 1):
        norms = norms_per_group(2, jax.grad(group_loss)(PARAMS, group))
        assert norms[group] > 0 and norms[1 - group] == 0


def test_row_draws_depend_on_key_and_row_alone():
    u, noise, dropped = flow_loss().draw(jax.random.split(jax.random.key(0), 8).reshape(2, 4))
    again, _, _ = flow_loss().draw(jax.random.split(jax.random.key(0), 8).reshape(4, 2))
    np.testing.assert_array_equal(u.ravel(), again.ravel())
    assert len(np.unique(u)) == 8 and noise.shape == (2, 4, 8, 8, 1) and dropped.dtype == bool


def test_gradient_norm_per_group_is_that_of_its_layers():
    _, metrics = one_step()
    gradients = jax.grad(lambda p: flow_loss()(p, Frozen(contexts=TABLE), batch(), _keys())[0])(PARAMS)
    first = optax.tree.norm(jax.tree.map(lambda x: x[:2], gradients["experts"]))
    np.testing.assert_allclose(metrics["grad_norm_per_group"][0], first, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-5)


def _keys():
    key = jax.random.fold_in(jax.random.key(5), 0)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8))


@pytest.mark.parametrize("form", [{"remat": "dots"}, {"remat": "full"}, {"unroll": True}])
def test_gradients_do_not_depend_on_remat_and_unrolling(form):
    (_, plain), (_, other) = one_step(), one_step(flow_loss(**form))
    np.testing.assert_allclose(plain["grad_norm_per_group"], other["grad_norm_per_group"], rtol=1e-4)


def test_bfloat16_computes_over_float32_masters():
    state, metrics = one_step(flow_loss(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics["loss"], one_step()[1]["loss"], rtol=2e-2)


def test_average_and_clipping_follow_their_formulas():
    """One step by hand: gradients clipped to the norm, AdamW's first step, the average a tenth of the way."""
    stage_keys = dict(train__ema_decay=0.9, train__clip_norm=1e-3, train__learning_rate=0.5, train__warmup_steps=0)
    state, metrics = one_step(**stage_keys)
    assert metrics["grad_norm"] > 1e-3
    gradients = jax.grad(lambda p: flow_loss()(p, Frozen(contexts=TABLE), batch(), _keys())[0])(PARAMS)
    name = ("head", "proj", "kernel")
    g, before, after, ema = (_leaf(tree, name) for tree in (gradients, PARAMS, state.params, state.ema))
    g = g * 1e-3 / metrics["grad_norm"]
    np.testing.assert_allclose(
        after, before - learning_rate(tiny_config(**stage_keys).train)(0) * g / (np.abs(g) + 1e-8), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(ema, 0.9 * before + 0.1 * after, rtol=1e-5, atol=1e-6)


def _leaf(tree, path):
    for name in path:
        tree = tree[name]
    return np.asarray(tree)


@pytest.mark.parametrize("decay, last", [("none", 1.0), ("linear", 1 / 91), ("cosine", 0.0003)])
def test_learning_rate_warms_up_and_decays(decay, last):
    stage = tiny_config(train__steps=100, train__warmup_steps=10, train__learning_rate=1.0, train__decay=decay).train
    rate = [float(learning_rate(stage)(step)) for step in range(100)]
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert rate[-1] == pytest.approx(last, rel=0.02)


def test_answers_alone_are_learnt():
    """The loss is the mean negative log-likelihood of answer tokens; those before count for nothing."""
    source = digits.Questions("train", ENCODER)
    records = [source[i] for i in (0, 1, 6)]
    rows = question_batch(ENCODER, records, CONFIG.data.answer_length)
    value, _ = AnswerLoss(CONFIG.model_config, jnp.float32, "none", False)(VLM, None, rows, None)
    hidden, _ = qwen2_vl.forward(CONFIG.model_config.vlm, VLM, rows["prompts"])
    scores = jax.nn.log_softmax(qwen2_vl.logits(CONFIG.model_config.vlm, VLM, hidden))
    expected = [
        -scores[row, at - 1, record.input_ids[at]]
        for row, record in enumerate(records)
        for at in range(len(record.input_ids))
        if record.is_answer[at]
    ]
    assert value == pytest.approx(np.mean(expected), rel=1e-5)
    texts = [ENCODER.tokenizer.decode(record.input_ids[record.is_answer]) for record in records]
    assert texts == [f"{source.text(i)[1]}<|im_end|>" for i in (0, 1, 6)]
