"""Meshes that fit the devices, and those that do not; and the placement of rows and weights on them."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from lattejax import configuration
from lattejax.errors import UserError
from lattejax.parallel import rules
from lattejax.parallel.mesh import AXES, make_mesh, mesh_shape
from lattejax.parallel.rows import Rows
from lattejax.runs.shapes import abstract_params, abstract_trained
from lattejax.training.layout import check_mesh
from lattejax.training.step import init_state
from tests.helpers import config_file, tiny_config


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({"data": 8}, (1, 8, 1, 1)),
        ({"fsdp": 2, "tensor": -1}, (1, 1, 2, 4)),
        ({"expert": -1, "tensor": 8}, (1, 1, 1, 8)),
    ],
)
def test_sizes_that_fit(sizes, shape):
    assert mesh_shape(sizes, 8) == shape


@pytest.mark.parametrize(
    "sizes, named",
    [
        ({"tensor": 4}, "does not fit the 8 devices"),
        ({"tensor": 3, "fsdp": -1}, "does not fit the 8 devices"),
        ({"tensor": 16, "fsdp": -1}, "does not fit the 8 devices"),
        ({"tensor": -1, "fsdp": -1}, "has two axes of -1"),
        ({"tensor": 0}, "tensor=0 must be positive"),
        ({"model": 8}, "'model' is unknown"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, named):
    with pytest.raises(ValueError, match=named):
        mesh_shape(sizes, 8)


# ---- Rows


def test_a_groups_rows_are_contiguous_and_split_into_micro_batches():
    rows = Rows(24, accumulation=2, groups=3)
    np.testing.assert_array_equal(rows.indices[0], [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]])
    np.testing.assert_array_equal(rows.indices[1], [[4, 5, 6, 7], [12, 13, 14, 15], [20, 21, 22, 23]])
    np.testing.assert_array_equal(Rows(6, accumulation=2).indices, [[0, 1, 2], [3, 4, 5]])


def test_rows_are_placed_by_their_indices():
    mesh, rows = make_mesh({}, jax.devices()[:1]), Rows(24, accumulation=2, groups=3)
    assert rows.of_process(mesh) == list(range(24))
    batch = {"latents": np.arange(48.0).reshape(24, 2)}
    np.testing.assert_array_equal(rows.place(mesh, batch)["latents"], batch["latents"][rows.indices])
    described = rows.abstract(mesh, batch)["latents"]
    assert (described.shape, described.dtype) == ((2, 3, 4, 2), np.float64)


@pytest.mark.parametrize(
    "rows, sizes, named",
    [
        (Rows(24, groups=3), {"expert": 2}, r"mesh\.expert=2 does not divide the 3 groups"),
        (
            Rows(24, 2, 4),
            {"data": 2, "fsdp": 2},
            r"24 must be a multiple of 4 shares of the mesh \(data \* fsdp\) times 2",
        ),
        (
            Rows(20, 2),
            {"expert": 4, "data": 2},
            r"20 must be a multiple of 8 shares of the mesh \(expert \* data \* fsdp\)",
        ),
    ],
)
def test_batches_that_do_not_fit_a_mesh_are_refused(rows, sizes, named):
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    with pytest.raises(ValueError, match=named):
        rows.check(mesh, "train.batch_size")


# ---- Rules


def test_optimizer_and_average_are_sharded_like_the_weights():
    config = tiny_config()
    params = abstract_trained(config)
    state = jax.eval_shape(lambda params: init_state(config.train, params), params)
    mesh = AbstractMesh((2, 2, 2, 2), AXES)
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): rules.spec(mesh, name, leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(state)
        for name in [jax.tree_util.keystr(path, simple=True, separator="/")]
    }
    ours = {name.removeprefix("params/"): spec for name, spec in specs.items() if name.startswith("params/")}
    assert ours["experts/decoder/mlp/up_proj/weight"] == PartitionSpec("expert", "tensor", "fsdp")
    assert ours["experts/decoder/mlp/down_proj/weight"] == PartitionSpec("expert", "fsdp", "tensor")
    assert ours["experts/decoder/input_norm/scale"] == PartitionSpec("expert", None)
    for copy in ("ema", "optimizer/1/0/mu", "optimizer/1/0/nu"):
        assert {name: specs[f"{copy}/{name}"] for name in ours} == ours
    assert rules.spec(mesh, "vlm/text/layers/mlp/up_proj/weight", (4, 48, 32)) == PartitionSpec(None, "tensor", "fsdp")
    assert rules.spec(mesh, "experts/3/decoder/mlp/up_proj/weight", (48, 32), ("tensor",)) == PartitionSpec(
        "tensor", None
    )
    with pytest.raises(ValueError, match="mesh axis expert=2 does not divide experts/norm/scale of shape"):
        rules.spec(mesh, "experts/norm/scale", (3, 8))


@pytest.mark.parametrize("tensor, of_kv_heads", [(2, "tensor"), (4, None)])
def test_complete_heads_are_sharded_and_too_few_kv_heads_are_replicated(tensor, of_kv_heads):
    mesh = AbstractMesh((1, 1, 2, tensor), AXES)
    attention = "vlm/text/layers/attention"
    for name, heads, axis in (("q_proj", 12, "tensor"), ("k_proj", 2, of_kv_heads), ("v_proj", 2, of_kv_heads)):
        shape = (28, heads, 128, 1536)
        assert rules.spec(mesh, f"{attention}/{name}/weight", shape) == PartitionSpec(None, axis, None, "fsdp")
        assert rules.spec(mesh, f"{attention}/{name}/bias", shape[:-1]) == PartitionSpec(None, axis, None)
    qkv = "optimizer/1/0/mu/vision/blocks/attention/qkv/weight"
    assert rules.spec(mesh, qkv, (32, 3, 16, 80, 1280)) == PartitionSpec(None, None, "tensor", None, "fsdp")
    with pytest.raises(ValueError, match=r"tensor=\d does not divide .*q_proj/weight of shape \(3, 128, 384\)"):
        rules.spec(mesh, f"{attention}/q_proj/weight", (3, 128, 384))


def test_a_matrix_that_no_rule_names_is_warned_of(caplog):
    """Every matrix of the model matches a rule."""
    mesh = AbstractMesh((1, 1, 1, 1), AXES)
    for variant in ("couple", "blend"):
        for path, leaf in jax.tree.leaves_with_path(abstract_params(tiny_config(model__variant=variant))):
            rules.spec(mesh, jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)
    assert not caplog.text
    for _ in range(2):
        rules.spec(mesh, "experts/adapter/down/weight", (4, 8, 8))
    assert caplog.text.count("no rule of parallel.rules matches the matrix experts/adapter/down/weight") == 1


@pytest.mark.parametrize(
    "tensor, named", [(8, "the 12 query heads of model.text"), (6, "the 16 query heads of model.v")]
)
def test_a_tensor_axis_that_would_split_query_heads_is_refused(tensor, named):
    config = configuration.resolve(config_file("imagenet256"))
    mesh = AbstractMesh((4, 1, 4, tensor), AXES)
    with pytest.raises(UserError, match=f"mesh.tensor={tensor} does not divide {named}"):
        check_mesh(config, mesh)
