"""The generation pathway against a plain float64 rendering of the method, and its forms against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lattejax.models import couple, functional, generation, qwen2_vl
from lattejax.models.couple import ModelConfig
from lattejax.models.generation import GenerationConfig
from lattejax.models.qwen2_vl import Prompts, VLMConfig
from lattejax.models.rotary import token_positions
from lattejax.models.text import TextConfig
from lattejax.models.vision import VisionConfig
from tests.helpers import randomize
from tests.models import rendering

TEXT = TextConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=20,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    rope_theta=100.0,
    mrope_section=(1, 0, 1),
)


group_velocities = jax.jit(generation.group_velocities, static_argnames=("config", "remat", "unroll"))
read_prompts = jax.jit(couple.read_prompts, static_argnames="config")


def model(num_groups: int, residual: str, **overrides) -> ModelConfig:
    text = TextConfig(**vars(TEXT) | overrides)
    vision = VisionConfig(depth=1, embed_dim=8, num_heads=1, patch_size=2, hidden_size=text.hidden_size)
    return ModelConfig(
        VLMConfig(text, vision),
        GenerationConfig(text, (4, 6, 3), num_groups=num_groups, residual_attention=residual, patch_size=2),
    )


def prompts_of_lengths(lengths: list[int], seed: int = 0) -> Prompts:
    rng, longest = np.random.default_rng(seed), max(lengths)
    ids = rng.integers(0, TEXT.vocab_size, (len(lengths), longest)).astype(np.int32)
    positions = token_positions(np.zeros(longest), [], image_token=-1, merge=2)
    mask = np.arange(longest) < np.array(lengths)[:, None]
    return Prompts(ids, mask, np.where(mask[:, None], positions, 0).astype(np.int32))


def weights(config: ModelConfig):
    vlm = randomize(qwen2_vl.init(config.vlm, jax.random.key(0)), 1)
    return vlm, randomize(couple.init_generation(config, vlm, jax.random.key(1)), 2)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("residual", ["probabilities", "none"])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_every_group_equals_the_plain_rendering(num_groups, residual, kv_heads):
    """In float64, on padded prompts of three lengths: to 1e-10, some thousands of roundings of 1e-16."""
    with jax.enable_x64(True):
        config = model(num_groups, residual, num_kv_heads=kv_heads)
        vlm, params = (float64(tree) for tree in weights(config))
        lengths = [5, 9, 1]
        table = read_prompts(config, vlm, prompts_of_lengths(lengths))
        rng = np.random.default_rng(3)
        x_t = rng.standard_normal((num_groups, 3, 4, 6, 3))
        t = rng.uniform(size=(num_groups, 3))
        index = np.tile(np.arange(3), (num_groups, 1))
        contexts = couple.share_contexts(config, table, index)
        ours = group_velocities(config.generation, params, contexts, x_t, t)
        experts = float64(functional.unstack(params["experts"]))

    per_group = config.generation.layers_per_group
    for group in range(num_groups):
        for row, length in enumerate(lengths):
            layers = range(group * per_group, (group + 1) * per_group)
            contexts = [
                (np.asarray(table.layers.keys[i, row, :length]), np.asarray(table.layers.values[i, row, :length]))
                for i in layers
            ]
            expected = rendering.velocity(
                params,
                config.generation,
                [experts[i] for i in layers],
                x_t[group, row],
                t[group, row],
                contexts,
                length,
            )
            np.testing.assert_allclose(ours[group, row], expected, rtol=1e-10, atol=1e-10)


def test_residual_attention_changes_the_velocity():
    """So that the comparison above would notice its absence."""
    plain, residual = (velocities(model(2, kind), unroll=False) for kind in ("none", "probabilities"))
    assert np.abs(plain - residual).max() > 1e-3


def velocities(config: ModelConfig, **kwargs):
    vlm, params = weights(model(config.generation.num_groups, "probabilities"))
    if config.generation.residual_attention == "none":
        params["experts"] = {name: leaf for name, leaf in params["experts"].items() if name != "residual_gate"}
    table = read_prompts(config, vlm, prompts_of_lengths([5, 9]))
    groups = config.generation.num_groups
    rng = np.random.default_rng(0)
    x_t, t = (
        rng.standard_normal((groups, 2, 4, 6, 3)).astype(np.float32),
        rng.uniform(size=(groups, 2)).astype(np.float32),
    )
    contexts = couple.share_contexts(config, table, jnp.tile(jnp.arange(2), (groups, 1)))
    return group_velocities(config.generation, params, contexts, x_t, t, **kwargs)


@pytest.mark.parametrize(
    "form", [{"unroll": True}, {"remat": "dots"}, {"remat": "full"}, {"unroll": True, "remat": "full"}]
)
def test_scanned_unrolled_and_rematerialised_layers_agree(form):
    config = model(2, "probabilities")
    np.testing.assert_allclose(velocities(config), velocities(config, **form), rtol=1e-4, atol=1e-5)


def test_sampling_form_equals_training_form():
    """A group's layers as a list, as sampling has them, against the scanned stack of training."""
    config = model(2, "probabilities")
    vlm, params = weights(config)
    prompts = prompts_of_lengths([5, 9])
    stacked = read_prompts(config, vlm, prompts)
    listed = read_prompts(config, qwen2_vl.unstack(vlm), prompts)
    x_t = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype(np.float32)
    t = np.array([0.1, 0.7], np.float32)
    rows = np.arange(2)
    contexts = couple.share_contexts(config, stacked, np.tile(rows, (2, 1)))
    expected = group_velocities(config.generation, params, contexts, np.stack([x_t, x_t]), np.stack([t, t]))
    experts = functional.unstack(params["experts"])
    for group in range(2):
        own = params | {"experts": generation.group_layers(config.generation, experts, group)}
        context = couple.group_context(config, listed, group, rows)
        ours = generation.velocity(config.generation, own, context, x_t, t)
        np.testing.assert_allclose(ours, expected[group], rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_a_velocity():
    config = model(2, "probabilities")
    vlm, params = weights(config)
    experts = functional.unstack(params["experts"])[:2]
    x_t = np.random.default_rng(0).standard_normal((1, 4, 6, 3)).astype(np.float32)

    def at(prompts, rows):
        table = read_prompts(config, qwen2_vl.unstack(vlm), prompts)
        context = couple.group_context(config, table, 0, rows)
        return generation.velocity(config.generation, params | {"experts": experts}, context, x_t, jnp.array([0.2]))

    padded = prompts_of_lengths([5, 9])
    alone = jax.tree.map(lambda x: x[:1, ..., :5], padded)
    np.testing.assert_allclose(at(padded, np.array([0])), at(alone, np.array([0])), rtol=1e-5, atol=1e-6)


def test_untrained_pathway_starts_at_zero_velocity_from_the_vlms_weights():
    config = model(2, "probabilities")
    vlm = qwen2_vl.init(config.vlm, jax.random.key(0))
    params = couple.init_generation(config, vlm, jax.random.key(1))
    for replica, original in zip(
        jax.tree.leaves(params["experts"]["decoder"]), jax.tree.leaves(vlm["text"]["layers"]), strict=True
    ):
        np.testing.assert_array_equal(replica, original)
    table = read_prompts(config, vlm, prompts_of_lengths([5]))
    contexts = couple.share_contexts(config, table, np.zeros((2, 1), int))
    x_t = np.ones((2, 1, 4, 6, 3), np.float32)
    assert not np.any(group_velocities(config.generation, params, contexts, x_t, np.zeros((2, 1), np.float32)))


def test_one_step_costs_a_kth_of_vanillas_and_takes_no_vlm_weights():
    """The step of one group, compiled with its layers unrolled, against the same model with K = 1; within 10 %."""
    flops = {}
    for groups in (1, 4):
        config = model(groups, "probabilities", hidden_size=96, intermediate_size=256, mrope_section=(3, 2, 3))
        vlm, params = weights(config)
        table = read_prompts(config, qwen2_vl.unstack(vlm), prompts_of_lengths([16] * 4))
        context = couple.group_context(config, table, 0, np.arange(4))
        experts = generation.group_layers(config.generation, functional.unstack(params["experts"]), 0)
        own = params | {"experts": experts}
        x_t, t = jnp.ones((4, 4, 6, 3)), jnp.array([0.1])
        step = jax.jit(lambda own, context, x_t, t, g=config.generation: generation.velocity(g, own, context, x_t, t))
        compiled = step.lower(own, context, x_t, t).compile()
        flops[groups] = compiled.cost_analysis()["flops"]
        own_inputs = jax.tree.leaves((own, context, x_t, t))
        assert len(jax.tree.leaves(compiled.in_avals)) == len(own_inputs)
        vlm_leaves = {id(leaf) for leaf in jax.tree.leaves(vlm)}
        assert not vlm_leaves & {id(leaf) for leaf in own_inputs}
        assert set(own) == {"embedding", "time", "experts", "head"} and len(experts) == 4 // groups
    assert flops[4] == pytest.approx(flops[1] / 4, rel=0.1)


@pytest.mark.parametrize("groups", [3, 0, 5])
def test_groups_that_do_not_divide_the_layers_are_refused(groups):
    with pytest.raises(ValueError, match="does not divide the 4 layers"):
        model(groups, "probabilities")
