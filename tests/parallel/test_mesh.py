"""Meshes that fit the devices, and those that do not."""

import pytest

from lattejax.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({"data": 8}, (1, 8, 1, 1)),
        ({"fsdp": 2, "tensor": -1}, (1, 1, 2, 4)),
        ({"expert": -1, "tensor": 8}, (1, 1, 1, 8)),
    ],
)
def test_sizes_that_fit(sizes, shape):
    devices = list(range(8))  # a mesh only arranges them
    assert make_mesh(sizes, devices).devices.shape == shape


@pytest.mark.parametrize(
    "sizes, named",
    [
        ({"tensor": 4}, "does not fit the 8 devices"),
        ({"tensor": 3, "fsdp": -1}, "does not fit the 8 devices"),
        ({"tensor": 16, "fsdp": -1}, "does not fit the 8 devices"),
        ({"tensor": -1, "fsdp": -1}, "leaves two axes open"),
        ({"tensor": 0}, "tensor=0 must be positive"),
        ({"model": 8}, "'model' is unknown"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, named):
    with pytest.raises(ValueError, match=named):
        make_mesh(sizes, list(range(8)))
