"""One optimizer step: the same results however it is split, and changes only to trained weights."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lattejax.data import digits
from lattejax.data.chats import Turn
from lattejax.data.examples import image_batcher
from lattejax.data.prompts import question_batch
from lattejax.evaluation.held_out import HeldOutFlowLoss, HeldOutLoss
from lattejax.flow.densities import Shifted
from lattejax.flow.path import interpolate
from lattejax.models import functional, generation, latte_flow, qwen2_vl
from lattejax.models.conditioning import Step
from lattejax.objectives.answers import AnswerLoss, answer_loss, weigh_answers
from lattejax.objectives.flow import FlowLoss, Frozen, norms_per_group
from lattejax.parallel.mesh import one_device
from lattejax.parallel.rows import Rows
from lattejax.runs.data import open_data
from lattejax.sampling.images import read_prompts
from lattejax.training import generation_stage
from lattejax.training.generation_stage import caption_prompts, flow_step
from lattejax.training.step import init_state, learning_rate, make_optimizer, make_train_step
from tests.helpers import assert_same_bits, encoder_for, products, randomize, tiny_config

CONFIG = tiny_config()
ENCODER = encoder_for(CONFIG)
MODEL = CONFIG.model_config
PROMPTS = caption_prompts(CONFIG, ENCODER, digits.CAPTIONS)
EMPTY = jax.tree.map(lambda x: x[-1:], PROMPTS)


@functools.cache
def weights(model=MODEL):
    """The trained and the frozen weights."""
    params = latte_flow.init(model, qwen2_vl.init(model.vlm, jax.random.key(0)), jax.random.key(1))
    trained, fixed = latte_flow.split_trained(model, params)
    return randomize(trained, scale=0.1), fixed


PARAMS, FIXED = weights()
VLM = FIXED["vlm"]
TABLE = read_prompts(MODEL, VLM, PROMPTS)
SHARED = Frozen({}, contexts=TABLE)
BLEND = tiny_config(model__variant="blend")


def flow_loss(config=CONFIG, **overrides) -> FlowLoss:
    """The config's loss, but for these."""
    settings = dict(prompt_dropout=0.4, answer_weight=0.5, dtype=jnp.float32, remat="none", unroll=False)
    return dataclasses.replace(generation_stage.flow_loss(config), **settings | overrides)


def test_the_config_decides_about_the_loss():
    settings = dict(stratified=False, prompt_dropout=0.3, answer_weight=0.7, remat="full", unroll=True)
    config = tiny_config(dtype="bfloat16", **{f"train__{key}": value for key, value in settings.items()})
    loss = generation_stage.flow_loss(config)
    assert {key: getattr(loss, key) for key in settings} == settings
    assert (loss.dtype, loss.config) == (jnp.bfloat16, config.model_config)


@functools.cache
def batch(rows: int = 8, config=CONFIG) -> dict:
    source = open_data(config)
    drawings = source.drawings("train", ENCODER).__getitems__(range(rows))
    return jax.tree.map(jnp.asarray, {"images": image_batcher(config, ENCODER, source.captions)(drawings)})


@functools.cache
def questions(rows: int = 4) -> dict:
    source = digits.Questions("train", ENCODER)
    records = source.__getitems__([7 * i for i in range(rows)])
    batch = {"questions": question_batch(ENCODER, records, CONFIG.data.answer_length)}
    return weigh_answers(jax.tree.map(jnp.asarray, batch))["questions"]


def grouped(tree, groups: int = 2):
    """Rows as in the stratified loss, where each group has its own."""
    return jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), tree)


def by_group(inputs: dict) -> dict:
    """A batch's images in groups; questions are not grouped."""
    return inputs | {"images": grouped(inputs["images"])}


def row_keys(rows: int = 8, stratified: bool = True):
    """The row keys of step 0."""
    key = jax.random.fold_in(jax.random.key(5), 0)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    return {"images": grouped(keys) if stratified else keys}


def one_step(loss=None, frozen=SHARED, inputs=None, params=PARAMS, **overrides):
    stage, rows, step = compiled_step(loss or flow_loss(), tuple(overrides.items()))
    inputs = batch() if inputs is None else inputs
    inputs = {name: jax.tree.map(lambda x, name=name: x[rows[name].indices], part) for name, part in inputs.items()}
    return step(init_state(stage, params), frozen, inputs, jax.random.key(5))


@functools.cache
def compiled_step(loss: FlowLoss, overrides: tuple):
    """Cached, because compilation takes most of the time."""
    stage = tiny_config(**dict(overrides)).train
    rows = {
        "images": Rows(8, stage.accumulation, 2 if loss.stratified else None),
        "questions": Rows(4, stage.accumulation),
    }
    step = make_train_step(
        stage, loss, rows, lambda gradients: {"grad_norm_per_group": norms_per_group(loss.config, gradients)}
    )
    return stage, rows, jax.jit(step)


jitted = functools.cache(jax.jit)


def test_micro_batches_add_up_to_the_batch():
    """Same rows, same draws, same groups; float32 sums in another order."""
    (_, expected), (_, accumulated) = one_step(), one_step(train__accumulation=4)
    for name in expected:
        np.testing.assert_allclose(expected[name], accumulated[name], rtol=1e-5, err_msg=name)


def test_shared_contexts_equal_contexts_of_each_row():
    """With prompt dropout in both: the gathered table against reading each row's own prompt."""
    own = batch(config=tiny_config(train__share_contexts=False))
    assert "prompts" in own["images"] and "caption" not in own["images"]
    _, shared = one_step()
    _, rows = one_step(frozen=Frozen(FIXED, unconditional=EMPTY), inputs=own)
    for name in shared:
        np.testing.assert_allclose(shared[name], rows[name], rtol=1e-5, err_msg=name)


def test_dropped_prompts_are_the_empty_prompt():
    captions_do_not_matter = []
    for captions in (np.zeros(8, np.int32), np.full(8, 7, np.int32)):
        inputs = {"images": batch()["images"] | {"caption": captions}}
        _, metrics = one_step(flow_loss(prompt_dropout=1.0), inputs=inputs)
        captions_do_not_matter.append(float(metrics["loss"]))
    assert captions_do_not_matter[0] == captions_do_not_matter[1]


@pytest.mark.parametrize("sizes", [(), (1, 3)])
def test_every_group_trains_only_on_its_own_share(sizes):
    """Groups take contiguous blocks of rows: the first half trains group 0's layers, the second group 1's."""
    config = tiny_config(model__group_sizes=sizes)
    loss, rows = flow_loss(config, prompt_dropout=0.0), by_group(batch())

    @jax.jit
    def norms(params, group):
        def group_loss(params):
            return loss(params, SHARED, rows, row_keys())[1]["loss_per_group"][group]

        return norms_per_group(config.model_config, jax.grad(group_loss)(params))

    for group in (0, 1):
        found = norms(PARAMS, group)
        assert found[group] > 0 and found[1 - group] == 0


def test_row_draws_depend_only_on_key_and_row():
    keys = jax.random.split(jax.random.key(0), 8)
    complete, last = flow_loss().draw(keys), flow_loss().draw(keys[5:])
    assert_same_bits(flow_loss().draw(grouped(keys)), grouped(complete))
    for ours, theirs in zip(complete, last, strict=True):
        np.testing.assert_array_equal(ours[5:], theirs)
    u, noise, dropped = complete
    assert len(np.unique(u)) == 8 and noise.shape == (8, 8, 8, 1) and dropped.dtype == bool


# ---- Drawing flow times


@pytest.mark.parametrize(
    "overrides",
    [
        dict(train__density="logit_normal", train__density_mean=-0.3),
        dict(train__density="shifted", train__density_shift=0.4),
        dict(model__interval_edges=(0.0, 0.3, 1.0)),
        dict(model__interval_edges=(0.0, 0.3, 1.0), train__interval_overlap=0.6, train__density="shifted"),
        dict(
            model__prediction="x",
            model__interval_edges=(0.0, 0.8, 1.0),
            train__density="shifted",
            train__density_shift=6.0,
        ),
    ],
)
@pytest.mark.parametrize("stratified", [True, False])
def test_the_loss_equals_its_formula(overrides, stratified):
    """Row by row: t by the inverse of the distribution, the owner's velocity, and for stratified rows the weight K·P_k
    of their group. Near the image x-prediction compares with a velocity that counts more time left than there is."""
    config = tiny_config(**overrides)
    loss, density = flow_loss(config, stratified=stratified), config.train.flow_density
    intervals, latents = config.model_config.generation.intervals, batch()["images"]["latents"]
    rows = by_group(batch()) if stratified else batch()
    value, metrics = jax.jit(loss)(PARAMS, SHARED, rows, row_keys(stratified=stratified))
    u, noise, dropped = loss.draw(row_keys(stratified=False)["images"])
    starts, ends = map(density.cumulative, intervals.widened(config.train.interval_overlap))
    expected, owners, latest = [], [], 0.0
    for row in range(8):
        block = row // 4
        at = starts[block] + (ends[block] - starts[block]) * float(u[row]) if stratified else float(u[row])
        t = np.asarray(density.quantile(jnp.float32(at)))
        owners.append(int(intervals.group_of(t)))
        group = block if stratified else owners[-1]
        caption = 10 if dropped[row] else batch()["images"]["caption"][row]
        target = latents[row] - noise[row]
        if config.model.prediction == "x":
            target, latest = target * min(1.0, (1 - t) / 0.05), max(latest, t)
        error = velocity(config, group, caption, latents[row], noise[row], t) - target
        expected.append(float(np.mean(error**2)) * (2 * intervals.masses(density)[group] if stratified else 1.0))
    if stratified:
        outside = sum(owner != row // 4 for row, owner in enumerate(owners))
        assert (outside > 0) == (config.train.interval_overlap > 0), "rows outside their group's interval"
    assert len(set(owners)) == 2, "both groups have rows"
    assert latest > 0.95 or config.model.prediction == "velocity", "a row near the image"
    assert value == pytest.approx(np.mean(expected), rel=1e-4)
    per_group = np.asarray(metrics["loss_per_group"])
    assert value == pytest.approx(per_group @ intervals.masses(density), rel=1e-5)


@functools.partial(jax.jit, static_argnames=("config", "group"))
def velocity(config, group, caption, latents, noise, t):
    model = config.model_config.generation
    own, context = generation.of_group(model, PARAMS, TABLE, caption[None], group)
    x_t = interpolate(latents[None], noise[None], t[None])
    conditioning = generation.condition(model, own, Step(t[None], t[None]))
    return generation.velocity(model, own, context, x_t, conditioning)[0]


def test_both_ways_to_draw_t_have_the_same_objective():
    """The two losses' means over 300 batches, with little density in one group, within four standard errors."""
    config = tiny_config(train__density="shifted", train__density_shift=0.2)
    means = []
    for stratified in (True, False):
        loss, rows = flow_loss(config, stratified=stratified), by_group(batch()) if stratified else batch()
        keys = jax.random.split(jax.random.key(1), (300, 2, 4) if stratified else (300, 8))

        def total(keys, loss=loss, rows=rows):
            return loss(PARAMS, SHARED, rows, {"images": keys})[0]

        losses = jax.jit(jax.vmap(total))(keys)
        means.append((losses.mean(), losses.std() / np.sqrt(300)))
    (a, error_a), (b, error_b) = means
    assert abs(a - b) < 4 * np.hypot(error_a, error_b)


# ---- Blend


def blend_inputs():
    """Blend's inputs, with images in groups."""
    trained, fixed = weights(BLEND.model_config)
    inputs = by_group(batch()) | {"questions": questions()}
    return trained, Frozen(fixed, captions=jax.tree.map(jnp.asarray, PROMPTS)), inputs


def test_blends_loss_is_the_weighted_sum_of_both_streams():
    trained, frozen, inputs = blend_inputs()
    total, metrics = jitted(flow_loss(BLEND))(trained, frozen, inputs, row_keys())
    vlm = functional.merge(frozen.params, trained)["vlm"]
    answers = jax.jit(lambda vlm: answer_loss(BLEND.model_config.vlm, vlm, questions(), "none", False))(vlm)
    assert metrics["answer_loss"] == pytest.approx(float(answers), rel=1e-6)
    assert total == pytest.approx(float(metrics["loss"] + 0.5 * answers), rel=1e-6)
    couple = jitted(flow_loss())
    experts = trained["experts"] | {"decoder": vlm["text"]["layers"]}
    same = {name: trained[name] for name in ("embedding", "time", "head")} | {"experts": experts}
    table = read_prompts(MODEL, vlm, PROMPTS)
    alone, _ = couple(same, Frozen({}, contexts=table), {"images": inputs["images"]}, row_keys())
    assert metrics["loss"] == pytest.approx(float(alone), rel=1e-5), "Couple with equal weights has the same velocity"


def test_recomputing_logits_in_blocks_changes_only_rounding(monkeypatch):
    """Value and gradient of the answers' loss, with the last of the blocks incomplete."""
    asked, vocabulary = questions(), MODEL.vlm.text.vocab_size
    length = asked["prompts"].input_ids.shape[1] - 1
    monkeypatch.setattr(qwen2_vl, "LOGITS_AT_ONCE", 10)
    assert length % 10

    def of(remat):
        return jax.jit(jax.value_and_grad(lambda vlm: answer_loss(MODEL.vlm, vlm, asked, remat, False)))

    (value, gradient), (expected, exact) = of("full")(VLM), of("none")(VLM)
    assert value == pytest.approx(float(expected), rel=1e-6)
    near = functools.partial(np.testing.assert_allclose, rtol=0)
    # Sums of hundreds of float32 terms, in another order: a few times 2⁻²³ of the largest.
    jax.tree.map(lambda a, b: near(a, b, atol=5e-6 * np.abs(b).max()), gradient, jax.device_get(exact))
    has_all = [f"x{length}x{vocabulary}xf32" in of(remat).lower(VLM).as_text() for remat in ("none", "full")]
    assert has_all == [True, False], "an array of all logits"
    scanned = [len(re.findall("remat|checkpoint", str(jax.make_jaxpr(of(remat))(VLM)))) for remat in ("none", "full")]
    assert scanned[0] == 0 and scanned[1] >= 3, "the vision tower's layers, the text's, and the logits'"


def test_flow_matching_reaches_the_shared_layers_through_image_tokens_and_through_contexts():
    """The gradient of only the flow's loss, with and without its part through the contexts."""
    trained, frozen, inputs = blend_inputs()
    images = {"images": inputs["images"]}
    complete = jax.jit(jax.grad(lambda p: flow_loss(BLEND)(p, frozen, images, row_keys())[0]))(trained)
    vlm = functional.merge(frozen.params, trained)["vlm"]
    fixed_contexts = Frozen(frozen.params, contexts=read_prompts(BLEND.model_config, vlm, PROMPTS))
    fixed = jax.jit(jax.grad(lambda p: flow_loss(BLEND)(p, fixed_contexts, images, row_keys())[0]))(trained)
    for name in ("k_proj", "v_proj", "q_proj"):
        leaves = [tree["vlm"]["text"]["layers"]["attention"][name]["weight"] for tree in (complete, fixed)]
        assert all(np.abs(leaf).max() > 0 for leaf in leaves)
        assert np.abs(leaves[0] - leaves[1]).max() > 1e-5


def test_blend_trains_shared_layers_on_both_streams_and_nothing_else_of_the_vlm():
    trained, frozen, _ = blend_inputs()
    loss, inputs = flow_loss(BLEND), batch() | {"questions": questions()}
    state, metrics = one_step(loss, frozen, inputs, trained)
    assert set(state.params["vlm"]) == {"text"} and set(state.params["vlm"]["text"]) == {"layers"}
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params["vlm"], trained["vlm"])
    assert min(jax.tree.leaves(moved)) > 0
    _, accumulated = one_step(loss, frozen, inputs, trained, train__accumulation=2)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], accumulated[name], rtol=1e-4, err_msg=name)


def test_blends_loss_does_not_depend_on_unrolling():
    trained, frozen, inputs = blend_inputs()
    losses = (jitted(flow_loss(BLEND, unroll=unroll)) for unroll in (False, True))
    plain, unrolled = (loss(trained, frozen, inputs, row_keys())[0] for loss in losses)
    assert plain == pytest.approx(float(unrolled), rel=1e-5)


# ---- Prompts with images


@pytest.mark.parametrize("config", [CONFIG, BLEND], ids=["couple", "blend"])
def test_rows_with_pictures_train_and_dropped_rows_ignore_them(config):
    """With every prompt dropped the pictures do not matter; with none dropped they do."""
    pictures = tiny_config(data__prompts="pictures", train__share_contexts=False, data__prompt_length=36)
    images = batch(config=pictures)["images"]
    assert images["prompts"].images.patches.shape[:2] == (8, 1)
    length = images["prompts"].input_ids.shape[1]
    empty = ENCODER.batch([ENCODER.unconditional()], length)
    trained, fixed = weights(config.model_config)
    frozen = Frozen(fixed, unconditional=empty)
    turned = jax.tree.map(lambda x: x[::-1], images["prompts"].images.patches)
    others = images | {"prompts": images["prompts"]._replace(images=images["prompts"].images._replace(patches=turned))}
    texts = images | {"prompts": jax.tree.map(lambda x: np.repeat(x, 8, axis=0), empty)}

    def loss(rows, dropout):
        return float(
            jitted(flow_loss(config, prompt_dropout=dropout))(trained, frozen, by_group({"images": rows}), row_keys())[
                0
            ]
        )

    assert loss(images, 0.0) != loss(others, 0.0)
    assert loss(images, 1.0) == loss(others, 1.0)
    assert loss(images, 1.0) == pytest.approx(loss(texts, 0.0), rel=1e-5)


# ---- The optimizer


def test_gradient_norm_per_group_is_that_of_its_layers():
    _, metrics = one_step()
    gradients = jax.jit(jax.grad(lambda p: flow_loss()(p, SHARED, by_group(batch()), row_keys())[0]))(PARAMS)
    first = optax.tree.norm(jax.tree.map(lambda x: x[:2], gradients["experts"]))
    np.testing.assert_allclose(metrics["grad_norm_per_group"][0], first, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-5)


@pytest.mark.parametrize("sizes, clip_by", [((), "group"), ((1, 3), "group"), ((), "model")])
def test_groups_with_own_ends_and_clipping_do_not_depend_on_each_other(sizes, clip_by):
    """Gradients above the clipping norm, and other rows for group 1: group 0 changes only if one norm clips both."""
    settings = dict(train__batch_size=8, train__accumulation=1, train__warmup_steps=0, train__clip_norm=1e-3)
    own = dict(model__shared_ends=False, model__group_sizes=sizes, train__clip_by=clip_by)
    config = tiny_config(**settings, **own)
    step = jax.jit(flow_step(config, flow_loss(config)))
    images, params = batch()["images"], weights(config.model_config)[0]
    after = []
    for latents in (images["latents"], images["latents"].at[4:].multiply(30.0)):
        inputs = jax.tree.map(lambda x: x.reshape(1, 2, 4, *x.shape[1:]), images | {"latents": latents})
        state, metrics = step(init_state(config.train, params), SHARED, {"images": inputs}, jax.random.key(5))
        assert np.all(metrics["grad_norm_per_group"] > 1e-3)
        after.append(state.params)
    for group, is_same in enumerate((clip_by == "group", False)):
        ours, theirs = (
            generation.of_group(config.model_config.generation, one, TABLE, None, group)[0] for one in after
        )
        assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs))) == is_same


@pytest.mark.parametrize("form", [{"remat": "dots"}, {"remat": "full"}, {"unroll": True}])
def test_gradients_do_not_depend_on_remat_and_unrolling(form):
    def gradient(params):
        return jax.grad(lambda p: flow_loss(**form)(p, SHARED, by_group(batch()), row_keys())[0])(params)

    assert bool(re.search("remat|checkpoint", str(jax.make_jaxpr(gradient)(PARAMS)))) == ("remat" in form)
    (_, plain), (_, other) = one_step(), one_step(flow_loss(**form))
    np.testing.assert_allclose(plain["grad_norm_per_group"], other["grad_norm_per_group"], rtol=1e-4)


def test_bfloat16_computes_over_float32_masters():
    frozen = Frozen({}, contexts=functional.cast_floats(TABLE, jnp.bfloat16))
    state, metrics = one_step(flow_loss(dtype=jnp.bfloat16), frozen)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics["loss"], one_step()[1]["loss"], rtol=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_and_their_gradients_are_of_the_configs_dtype(dtype):
    """Of both stages. In bfloat16, what is computed of flow times stays in float32: that is a third of the products."""
    asked = weigh_answers({"questions": questions()})
    shared = Frozen({}, contexts=functional.cast_floats(TABLE, dtype))
    for loss, *arguments in (
        (flow_loss(dtype=dtype), PARAMS, shared, by_group(batch()), row_keys()),
        (AnswerLoss(MODEL, jnp.dtype(dtype), "none", False), VLM, None, asked, None),
    ):
        program = jax.make_jaxpr(jax.grad(lambda *all, loss=loss: loss(*all)[0]))(*arguments)
        operands = [{x.aval.dtype.name for x in product.invars} for product in products(program.jaxpr)]
        assert operands.count({dtype}) > 0.6 * len(operands) > 20
    in_dtype = flow_loss(dtype=jnp.dtype(dtype)).assemble(PARAMS, SHARED)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(in_dtype)} == {dtype}


def test_average_and_clipping_follow_their_formulas():
    """One step by hand: gradients clipped to the norm, AdamW's first step, the average moved by a tenth."""
    stage_keys = dict(train__ema_decay=0.9, train__clip_norm=1e-3, train__learning_rate=0.5, train__warmup_steps=0)
    state, metrics = one_step(**stage_keys)
    assert metrics["grad_norm"] > 1e-3
    gradients = jax.jit(jax.grad(lambda p: flow_loss()(p, SHARED, by_group(batch()), row_keys())[0]))(PARAMS)
    name = ("head", "proj", "weight")
    g, before, after, ema = (_leaf(tree, name) for tree in (gradients, PARAMS, state.params, state.ema))
    g = g * 1e-3 / metrics["grad_norm"]
    np.testing.assert_allclose(
        after, before - learning_rate(tiny_config(**stage_keys).train)(0) * g / (np.abs(g) + 1e-8), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(ema, 0.9 * before + 0.1 * after, rtol=1e-5, atol=1e-6)


def test_adamw_follows_its_formula_with_weight_decay_on_matrices_only():
    settings = dict(weight_decay=0.1, learning_rate=0.5, adam_b1=0.8, adam_b2=0.9, clip_norm=1e9, warmup_steps=0)
    stage = tiny_config(**{f"train__{key}": value for key, value in settings.items()}).train
    rng, names = np.random.default_rng(0), ("weight", "embedding", "bias", "scale")
    params = {"a": {name: rng.standard_normal(5).astype(np.float32) for name in names}}
    optimizer = make_optimizer(stage)
    state, first, second = optimizer.init(params), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for step in (1, 2):
        gradients = {"a": {name: rng.standard_normal(5).astype(np.float32) for name in names}}
        updates, state = optimizer.update(gradients, state, params)
        for name in names:
            g = gradients["a"][name]
            first[name], second[name] = 0.8 * first[name] + 0.2 * g, 0.9 * second[name] + 0.1 * g**2
            expected = first[name] / (1 - 0.8**step) / (np.sqrt(second[name] / (1 - 0.9**step)) + 1e-8)
            expected += 0.1 * params["a"][name] * (name in ("weight", "embedding"))
            rate = float(learning_rate(stage)(step - 1))
            np.testing.assert_allclose(updates["a"][name], -rate * expected, rtol=1e-5, atol=1e-6)
        params = optax.apply_updates(params, updates)
    assert {path[-1].key for path, _ in jax.tree.leaves_with_path(PARAMS)} == {"weight", "bias", "scale"}


def test_without_averaging_there_is_no_second_copy():
    stage = tiny_config(train__ema_decay=0.0).train
    state = jax.eval_shape(lambda: init_state(stage, PARAMS))
    assert state.ema is None and state.average is state.params and set(state.arrays) == {"params", "optimizer"}


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


def test_only_answers_are_learnt():
    """The loss is the mean negative log-likelihood of answer tokens; tokens before the answer do not count."""
    source = digits.Questions("train", ENCODER)
    records = source.__getitems__([0, 1, 6])
    rows = jax.tree.map(jnp.asarray, question_batch(ENCODER, records, CONFIG.data.answer_length))
    value, _ = AnswerLoss(MODEL, jnp.float32, "none", False)(VLM, None, weigh_answers({"questions": rows}), None)
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


def test_a_long_answer_may_count_as_much_as_a_short_one():
    """With weights="answers": the mean over answers of the mean over their tokens, also in a conversation."""
    first = [Turn("user", "Is this a seven?"), Turn("assistant", "no")]
    second = [Turn("user", "Which digit is this?"), Turn("assistant", "a handwritten zero one two")]
    short, both, other = (
        ENCODER.conversation(turns)
        for turns in (first, [*first, *second], [Turn("user", "A two?"), Turn("assistant", "yes")])
    )
    batch = question_batch(ENCODER, [both, other], len(both.input_ids), weights="answers")
    batch = weigh_answers({"questions": jax.tree.map(jnp.asarray, batch)})
    value, _ = AnswerLoss(MODEL, jnp.float32, "none", False)(VLM, None, batch, None)
    in_second = both.is_answer & (np.arange(len(both.input_ids)) >= len(short.input_ids))
    expected = [mean_loss(short, short.is_answer), mean_loss(both, in_second), mean_loss(other, other.is_answer)]
    assert value == pytest.approx(np.mean(expected), rel=1e-5)


def mean_loss(record, counted):
    """The mean negative log-likelihood of a record's tokens that count."""
    hidden, _ = qwen2_vl.forward(CONFIG.model_config.vlm, VLM, jax.tree.map(jnp.asarray, ENCODER.batch([record])))
    scores = jax.nn.log_softmax(qwen2_vl.logits(CONFIG.model_config.vlm, VLM, hidden))[0]
    return np.mean([-scores[at - 1, record.input_ids[at]] for at in np.flatnonzero(counted)])


def test_the_answers_loss_does_not_depend_on_how_rows_are_split():
    """Answers of different lengths, read by one process or in halves by two, in one batch or in micro-batches: loss and
    gradient are those of the mean over all answer tokens."""
    answers = ["zero one two three", "one", "two", "even odd yes no"]
    prompts = [ENCODER.question("Which digit is this?", [], answer) for answer in answers]
    lengths = [int(prompt.is_answer.sum()) for prompt in prompts]
    assert max(lengths) > 3 * min(lengths)
    complete, *halves = (
        question_batch(ENCODER, part, CONFIG.data.answer_length) for part in (prompts, prompts[:2], prompts[2:])
    )
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *halves)
    config, loss = tiny_config(), AnswerLoss(MODEL, jnp.float32, "none", False)
    found = []
    for batch, accumulation in ((complete, 1), (joined, 1), (joined, 2)):
        stage = dataclasses.replace(config.pretrain, accumulation=accumulation)
        rows = {"questions": Rows(4, accumulation)}
        inputs = {"questions": jax.tree.map(lambda x, at=rows["questions"].indices: x[at], batch)}
        step = jax.jit(make_train_step(stage, loss, rows, prepare=weigh_answers))
        _, metrics = step(init_state(stage, VLM), None, inputs, jax.random.key(0))
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)


def test_the_held_out_loss_does_not_depend_on_the_batches_it_is_computed_in():
    """20 rows at once, or 7 at a time with the last batch padded; each row's error is for its own flow time, whatever
    the density of those that are trained on. Over all of flow time, a group counts by the length of its interval."""
    source, found = open_data(CONFIG), []
    for batch_size, training in ((20, {}), (7, {"density": Shifted(0.3), "overlap": 0.5})):
        config = tiny_config(eval__examples=20, eval__batch_size=batch_size, model__interval_edges=(0.0, 0.3, 1.0))
        loss, make_batch = flow_loss(config, **training), image_batcher(config, ENCODER, source.captions)
        held_out = HeldOutLoss(config, loss, source.drawings("test", ENCODER), make_batch, one_device())
        found.append(held_out(PARAMS, SHARED))
    np.testing.assert_allclose(*found, rtol=1e-6)
    assert found[0].shape == (2,) and found[0][0] != found[0][1]
    score = HeldOutFlowLoss.open(config, source)
    figures = score(types.SimpleNamespace(held_out_losses=np.array([1.0, 2.0]))).figures
    assert figures["held_out_loss"] == pytest.approx(0.3 * 1 + 0.7 * 2)


# ---- A step that is not finite


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    """NaN latents in one row: weights, average and optimizer keep their bits; the step is counted as skipped."""
    images = batch()["images"]
    broken = {"images": images | {"latents": images["latents"].at[3, 0, 0].set(jnp.nan)}}
    before = init_state(tiny_config().train, PARAMS)
    state, metrics = one_step(inputs=broken)
    assert not np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    assert_same_bits(state[2:], before[2:])
    assert (int(state.step), int(state.skipped)) == (1, 1)
    state, metrics = one_step()
    assert metrics["skipped"] == 0 and (int(state.step), int(state.skipped)) == (1, 0)
    assert np.any(state.params["head"]["proj"]["weight"] != before.params["head"]["proj"]["weight"])
