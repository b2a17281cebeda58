"""The generation pathway against a plain float64 implementation of the method, and its forms against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lattejax.models import functional, generation, latte_flow, qwen2_vl
from lattejax.models.conditioning import Step
from lattejax.models.generation_config import GenerationConfig
from lattejax.models.latte_flow import ModelConfig
from lattejax.models.layers import Layers
from lattejax.models.qwen2_vl import Prompts, VLMConfig
from lattejax.models.rotary import token_positions
from lattejax.models.text import TextConfig
from lattejax.models.vision import VisionConfig
from tests.helpers import assert_same_bits, randomize
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
read_prompts = jax.jit(latte_flow.read_prompts, static_argnames="config")


def model(
    num_groups: int, residual: str = "probabilities", variant: str = "couple", pathway: dict | None = None, **overrides
) -> ModelConfig:
    """`overrides` are the language model's geometry, `pathway` the generation pathway's."""
    text = TextConfig(**vars(TEXT) | overrides)
    vision = VisionConfig(depth=1, embed_dim=8, num_heads=1, patch_size=2, hidden_size=text.hidden_size)
    settings = dict(latent_shape=(4, 6, 3), num_groups=num_groups, residual_attention=residual, patch_size=2)
    return ModelConfig(VLMConfig(text, vision), GenerationConfig(text, **settings | (pathway or {})), variant)


def prompts_of_lengths(lengths: list[int], seed: int = 0) -> Prompts:
    rng, longest = np.random.default_rng(seed), max(lengths)
    ids = rng.integers(0, TEXT.vocab_size, (len(lengths), longest)).astype(np.int32)
    positions = token_positions(np.zeros(longest), [], image_token=-1, merge=2)
    mask = np.arange(longest) < np.array(lengths)[:, None]
    positions = np.where(mask[:, None], positions, 0).astype(np.int32)
    return Prompts(*map(jnp.asarray, (ids, mask, positions)))


def weights(config: ModelConfig):
    vlm = randomize(qwen2_vl.init(config.vlm, jax.random.key(0)), 1)
    return {"vlm": vlm} | {
        name: randomize(part, seed)
        for seed, (name, part) in enumerate(latte_flow.init(config, vlm, jax.random.key(1)).items())
        if name != "vlm"
    }


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


CASES = {
    "one group": model(1),
    "two groups": model(2),
    "a group a layer": model(4),
    "no residual attention": model(2, "none"),
    "on logits": model(2, "logits"),
    "one gate a layer": model(2, pathway={"residual_gate": "layer"}),
    "one gate a layer, on logits": model(1, "logits", pathway={"residual_gate": "layer"}),
    "a head for each query": model(2, num_kv_heads=6),
    "one layer and three": model(2, pathway={"group_sizes": (1, 3)}),
    "three uneven groups": model(3, pathway={"group_sizes": (2, 1, 1), "interval_edges": (0.0, 0.2, 0.3, 1.0)}),
    "no positions but M-RoPE": model(2, pathway={"latent_position": "none"}),
    "predicting x": model(2, pathway={"prediction": "x"}),
    "blend, predicting x": model(2, variant="blend", pathway={"prediction": "x"}),
    "one row": model(2, pathway={"patch_size": 1, "latent_shape": (1, 5, 3)}),
    "blend": model(2, variant="blend"),
    "blend, no positions but M-RoPE": model(2, variant="blend", pathway={"latent_position": "none"}),
    "blend, one group, on logits": model(1, "logits", variant="blend"),
    "blend, uneven, a head for each query": model(2, variant="blend", num_kv_heads=6, pathway={"group_sizes": (3, 1)}),
    "7 of 28 layers": model(7, num_layers=28),
}


@pytest.mark.parametrize("case", CASES)
def test_every_group_equals_the_plain_implementation(case):
    """On padded prompts of three lengths. The pathway in float64 to 1e-9 of values near 1, because thousands of
    roundings of 1e-16 pass through up to 28 layers; the contexts to 1e-4, because the text's softmax is JAX's, in
    float32."""
    config = CASES[case]
    groups = config.generation.num_groups
    with jax.enable_x64(True):
        params = float64(weights(config))
        lengths = [5, 9, 1]
        prompts = prompts_of_lengths(lengths)
        table = read_prompts(config, params["vlm"], prompts)
        rng = np.random.default_rng(3)
        x_t = rng.standard_normal((groups, 3, *config.generation.latent_shape))
        t = rng.uniform(size=(groups, 3))
        rows = np.tile(np.arange(3), (groups, 1))
        ours = group_velocities(config.generation, latte_flow.pathway(config, params), table, rows, x_t, t)

    text, layers = config.vlm.text, range(config.vlm.text.num_layers)
    experts = [rendering.take(params["experts"], i) for i in layers]
    shared = params["vlm"]["text"]["layers"] if config.variant == "blend" else params["experts"]["decoder"]
    decoders = [rendering.take(shared, i) for i in layers]
    for row, length in enumerate(lengths):
        contexts = [tuple(np.asarray(x[i, row, :length]) for x in table.layers) for i in layers]
        plain = rendering.read(params["vlm"]["text"], text, prompts.input_ids[row, :length])
        np.testing.assert_allclose(contexts, plain, rtol=1e-4, atol=1e-4)
        for group, own in enumerate(config.generation.layers_of):
            expected = rendering.velocity(
                params,
                config.generation,
                experts[own],
                decoders[own],
                x_t[group, row],
                t[group, row],
                contexts[own],
                length,
            )
            np.testing.assert_allclose(ours[group, row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("other", [model(2, "none"), model(2, "logits"), model(2, pathway={"residual_gate": "layer"})])
def test_each_kind_of_residual_attention_has_a_different_velocity(other):
    """So that the comparison above would detect the wrong kind."""
    assert np.abs(velocities(model(2)) - velocities(other)).max() > 1e-3


def velocities(config: ModelConfig, **kwargs):
    """With the weights of gates per head, truncated if there are fewer gates."""
    params = weights(model(config.generation.num_groups))
    gates = config.generation.layer.num_gates
    experts = dict(params["experts"])
    experts["residual_gate"] = jax.tree.map(lambda x: x[:, :gates], experts["residual_gate"])
    if not gates:
        del experts["residual_gate"]
    pathway = latte_flow.pathway(config, params | {"experts": experts})
    table = read_prompts(config, params["vlm"], prompts_of_lengths([5, 9]))
    groups = config.generation.num_groups
    rng = np.random.default_rng(0)
    x_t, t = (
        rng.standard_normal((groups, 2, 4, 6, 3)).astype(np.float32),
        rng.uniform(size=(groups, 2)).astype(np.float32),
    )
    return group_velocities(config.generation, pathway, table, jnp.tile(jnp.arange(2), (groups, 1)), x_t, t, **kwargs)


@pytest.mark.parametrize(
    "form", [{"unroll": True}, {"remat": "dots"}, {"remat": "full"}, {"unroll": True, "remat": "full"}]
)
def test_scanned_unrolled_and_rematerialised_layers_agree(form):
    config = model(2)
    np.testing.assert_allclose(velocities(config), velocities(config, **form), rtol=1e-4, atol=1e-5)


def group_velocity(config: ModelConfig, params, prompts: Prompts, group: int, x_t, t):
    """The form for sampling: one group's layers as a list."""
    params = latte_flow.unstack(params)
    context = read_prompts(config, params["vlm"], prompts)
    pathway = latte_flow.pathway(config, params)
    own, context = generation.of_group(config.generation, pathway, context, None, group)
    conditioning = generation.condition(config.generation, own, Step(t, t))
    return generation.velocity(config.generation, own, context, x_t, conditioning)


@pytest.mark.parametrize(
    "config", [model(2), model(2, variant="blend"), model(2, pathway={"group_sizes": (1, 3)})], ids=repr
)
def test_sampling_form_equals_training_form(config):
    params, prompts = weights(config), prompts_of_lengths([5, 9])
    x_t = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 3)), jnp.float32)
    t, rows = np.array([0.1, 0.7], np.float32), np.arange(2)
    table, pathway = read_prompts(config, params["vlm"], prompts), latte_flow.pathway(config, params)
    stacks = (np.stack([x, x]) for x in (rows, x_t, t))
    expected = group_velocities(config.generation, pathway, table, *stacks)
    for group in range(2):
        ours = group_velocity(config, params, prompts, group, x_t, t)
        np.testing.assert_allclose(ours, expected[group], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", ["probabilities", "logits"])
@pytest.mark.parametrize("form", ["stacked", "a list"])
def test_attention_maps_are_what_the_plain_renderings_layers_hand_on(residual, form, monkeypatch):
    config = model(2, residual)
    g, group, length = config.generation, 1, 5
    handed_on, plain_layer = [], rendering.layer

    def recording(*args):
        h, carried = plain_layer(*args)
        handed_on.append(carried)
        return h, carried

    monkeypatch.setattr(rendering, "layer", recording)
    with jax.enable_x64(True):
        params = float64(weights(config))
        context = read_prompts(config, params["vlm"], prompts_of_lengths([length]))
        pathway, own = generation.of_group(g, latte_flow.pathway(config, params), context, None, group)
        x_t, t = np.random.default_rng(3).standard_normal((1, *g.latent_shape)), np.array([0.6])
        if form == "a list":
            pathway, own = latte_flow.unstack(pathway), own._replace(layers=Layers(own.layers).unstack())
        step = Step(jnp.asarray(t), jnp.asarray(t))
        maps = generation.attention_maps(g, pathway, own, jnp.asarray(x_t), generation.condition(g, pathway, step))

    layers = range(*g.layers_of[group].indices(config.vlm.text.num_layers))
    experts = [rendering.take(params["experts"], i) for i in layers]
    contexts = [tuple(np.asarray(x[i, 0]) for x in context.layers) for i in layers]
    rendering.velocity(params, g, experts, [one["decoder"] for one in experts], x_t[0], t[0], contexts, length)
    np.testing.assert_allclose(maps[:, 0], handed_on, rtol=1e-9, atol=1e-9)


def test_attention_maps_need_residual_attention():
    config = model(2, "none")
    g, params = config.generation, weights(config)
    context = read_prompts(config, params["vlm"], prompts_of_lengths([3]))
    x_t, t = jnp.zeros((1, *g.latent_shape)), jnp.array([0.1])
    pathway = latte_flow.pathway(config, params)
    with pytest.raises(ValueError, match="hands no maps on"):
        generation.attention_maps(g, pathway, context, x_t, generation.condition(g, pathway, Step(t, t)))


def test_padding_does_not_change_a_velocity():
    config = model(2)
    params = weights(config)
    x_t = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 3)), jnp.float32)
    padded = prompts_of_lengths([5, 9])
    alone = jax.tree.map(lambda x: x[:1, ..., :5], padded)
    t = jnp.array([0.2])
    np.testing.assert_allclose(
        group_velocity(config, params, padded, 0, x_t, t)[:1],
        group_velocity(config, params, alone, 0, x_t[:1], t),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("variant", latte_flow.VARIANTS)
def test_untrained_pathway_starts_at_zero_velocity_from_the_vlms_weights(variant):
    config = model(2, variant=variant)
    vlm = qwen2_vl.init(config.vlm, jax.random.key(0))
    params = latte_flow.init(config, vlm, jax.random.key(1))
    pathway = latte_flow.pathway(config, params)
    assert ("decoder" in params["experts"]) == (variant == "couple"), "Blend has no replicas"
    assert_same_bits(pathway["experts"]["decoder"], vlm["text"]["layers"])
    table = read_prompts(config, vlm, prompts_of_lengths([5]))
    x_t, t = np.ones((2, 1, 4, 6, 3), np.float32), np.zeros((2, 1), np.float32)
    assert not np.any(group_velocities(config.generation, pathway, table, np.zeros((2, 1), int), x_t, t))


def test_random_replicas_have_the_vlms_shapes_but_other_weights():
    config = model(2, pathway={"replica_init": "random"})
    vlm = qwen2_vl.init(config.vlm, jax.random.key(0))
    replicas = latte_flow.init(config, vlm, jax.random.key(1))["experts"]["decoder"]
    for replica, original in zip(jax.tree.leaves(replicas), jax.tree.leaves(vlm["text"]["layers"]), strict=True):
        assert replica.shape == original.shape
        flat = np.asarray(original).std() == 0  # norms and biases always start as constants
        assert flat or np.abs(replica - original).max() > 0.01


def test_blends_text_logits_are_the_vlms_bit_for_bit():
    """Parameters are split as for training, and merged again as in each step and each evaluation."""
    config = model(2, variant="blend")
    vlm = randomize(qwen2_vl.init(config.vlm, jax.random.key(0)), 1)
    trained, fixed = latte_flow.split_trained(config, latte_flow.init(config, vlm, jax.random.key(1)))
    assert set(trained["vlm"]["text"]) == {"layers"} and set(fixed["vlm"]) == {"text", "vision"}
    prompts = prompts_of_lengths([5, 9, 1])

    @jax.jit
    def logits(vlm):
        return qwen2_vl.logits(config.vlm, vlm, qwen2_vl.forward(config.vlm, vlm, prompts)[0])

    assert_same_bits(logits(functional.merge(fixed, trained)["vlm"]), logits(vlm))


def test_couple_does_not_train_the_vlm():
    config = model(2)
    trained, fixed = latte_flow.split_trained(config, weights(config))
    assert set(trained) == {"embedding", "time", "experts", "head"} and set(fixed) == {"vlm"}


def test_one_step_costs_a_kth_of_vanillas_and_reads_no_vlm_weights():
    """The step of one group, compiled with its layers unrolled, against the same model with K = 1; within 10 %."""
    flops = {}
    for groups in (1, 4):
        config = model(groups, hidden_size=96, intermediate_size=256, mrope_section=(3, 2, 3))
        params = latte_flow.unstack(weights(config))
        context = read_prompts(config, params["vlm"], prompts_of_lengths([16] * 4))
        own, context = generation.of_group(config.generation, latte_flow.pathway(config, params), context, None, 0)
        x_t, t = jnp.ones((4, 4, 6, 3)), jnp.array([0.1])

        def step(own, context, x_t, t, g=config.generation):
            return generation.velocity(g, own, context, x_t, generation.condition(g, own, Step(t, t)))

        compiled = jax.jit(step).lower(own, context, x_t, t).compile()
        flops[groups] = compiled.cost_analysis()["flops"]
        assert set(own) == {"embedding", "time", "experts", "head"} and len(own["experts"]) == 4 // groups
        vlm_leaves = {id(leaf) for leaf in jax.tree.leaves(params["vlm"])}  # with Blend's pathway, they would be read
        assert not vlm_leaves & {id(leaf) for leaf in jax.tree.leaves((own, context, x_t, t))}
    assert flops[4] == pytest.approx(flops[1] / 4, rel=0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_groups=3), "num_groups=3 does not divide the 4 layers"),
        (dict(num_groups=0), "num_groups=0 does not divide"),
        (dict(num_groups=2, pathway={"group_sizes": (1, 2)}), r"group_sizes=\(1, 2\) sum to 3, not to the 4 layers"),
        (
            dict(num_groups=2, pathway={"group_sizes": (1, 2, 1)}),
            "must be num_groups=2 positive",
        ),
        (dict(num_groups=2, pathway={"group_sizes": (4, 0)}), "positive integers"),
        (dict(num_groups=2, pathway={"interval_edges": (0.0, 0.5, 0.9)}), "must increase from 0 to 1"),
        (dict(num_groups=2, pathway={"interval_edges": (0.1, 0.5, 1.0)}), "must increase from 0 to 1"),
        (dict(num_groups=2, pathway={"interval_edges": (0.0, 0.5, 0.5, 1.0)}), "must increase from 0 to 1"),
        (dict(num_groups=2, pathway={"interval_edges": (0.0, 1.0)}), "1 intervals; num_groups=2 needs 3 edges"),
        (dict(num_groups=2, residual="maps"), "residual_attention='maps' is unknown"),
        (dict(num_groups=2, pathway={"residual_gate": "token"}), "residual_gate='token' is unknown"),
        (dict(num_groups=2, pathway={"replica_init": "zeros"}), "replica_init='zeros' is unknown"),
        (dict(num_groups=2, pathway={"latent_position": "rope"}), "latent_position='rope' is unknown"),
        (dict(num_groups=2, pathway={"prediction": "noise"}), "prediction='noise' is unknown"),
        (dict(num_groups=2, hidden_size=30, num_heads=3, num_kv_heads=1, mrope_section=(1, 2, 2)), "a multiple of 4"),
        (dict(num_groups=2, variant="mixed"), r"variant='mixed' is unknown; use one of \['couple', 'blend'\]"),
        (dict(num_groups=2, variant="blend", pathway={"replica_init": "random"}), "variant='blend' has none"),
    ],
)
def test_an_invalid_geometry_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)
