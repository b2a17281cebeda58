"""PyTorch's files are read without PyTorch: the same tensors, and nothing that a pickle could run."""

import collections
import io
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from lattejax.errors import UserError
from lattejax.weights import inception
from lattejax.weights.torch_files import MAGIC, PROTOCOL, read_tensors

FORMATS = {"archive": True, "before 1.6": False}


def written(value, archive: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 5, 6)
    found = {
        "plain": base,
        "a part of it, turned": base[1:3, ::2].permute(2, 0, 1),
        "a column": base[:, 0, 0],
        "one number": torch.tensor(3),
        "nothing": torch.empty(0, 3),
        "a parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    kinds = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
    return found | {str(kind): torch.randn(3).to(kind) for kind in kinds}


@pytest.mark.parametrize("archive", FORMATS.values(), ids=FORMATS)
def test_tensors_are_read_bit_for_bit(archive):
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    for state in (tensors(), module.state_dict(), collections.OrderedDict(tensors())):
        read = read_tensors(written(state, archive), "a.pth")
        assert list(read) == list(state)
        for name, expected in state.items():
            expected = expected.detach().contiguous()
            assert read[name].shape == tuple(expected.shape) and read[name].flags.writeable
            assert str(read[name].dtype) == str(expected.dtype).removeprefix("torch.")
            assert read[name].tobytes() == expected.flatten().view(torch.uint8).numpy().tobytes()


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("archive", FORMATS.values(), ids=FORMATS)
def test_a_pickle_runs_nothing(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"a\.pth cannot be read .* asks for (posix|nt)\.system; only tensors"):
        read_tensors(written({"weight": torch.ones(2), "attack": Attack()}, archive), "a.pth")
    assert not list(tmp_path.iterdir())


NOT_TENSORS = {
    "a module": (torch.nn.Linear(2, 2), "asks for torch.nn"),
    "a list": ([torch.ones(2)], "holds a list"),
    "no names": ({1: torch.ones(2)}, "1 is a "),
    "numbers": ({"epoch": 3}, "'epoch' is a int, expected a tensor"),
    "a sparse tensor": ({"a": torch.eye(2).to_sparse()}, "asks for torch._utils._rebuild_sparse_tensor"),
}


@pytest.mark.parametrize("archive", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("what", NOT_TENSORS)
def test_anything_but_tensors_is_one_clear_error(what, archive):
    value, named = NOT_TENSORS[what]
    with pytest.raises(UserError, match=named):
        read_tensors(written(value, archive), "a.pth")


def test_other_files_and_shapes_that_do_not_fit_are_refused():
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    for data, named in {
        b"": "neither an archive nor",
        b"\x89PNG": "neither an archive nor",
        pickle.dumps(MAGIC) + pickle.dumps(PROTOCOL + 1): "neither an archive nor",
        empty.getvalue(): "PyTorch's tensors",
        b"".join(map(pickle.dumps, (MAGIC, PROTOCOL, {"little_endian": False}))): "not little-endian",
    }.items():
        with pytest.raises(UserError, match=named):
            read_tensors(data, "a.pth")
    storage = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"I2\n(I3\nt(I1\ntI00\n(dtR"
    start = b"".join(map(pickle.dumps, (MAGIC, PROTOCOL, {})))
    with pytest.raises(UserError, match="more than its 4 stored elements"):
        read_tensors(start + b"(dVa\n" + tensor + b"s." + pickle.dumps(["0"]) + bytes([4, *bytes(7), *bytes(16)]), "a")


@pytest.mark.parametrize("archive", FORMATS.values(), ids=FORMATS)
def test_damaged_files_are_read_or_refused(archive):
    data, chance = written(tensors(), archive), random.Random(0)
    for place in range(0, len(data), len(data) // 200):
        with pytest.raises(UserError):
            read_tensors(data[:place], "a.pth")
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            read = read_tensors(bytes(flipped), "a.pth")
        except UserError:
            continue
        assert all(isinstance(x, np.ndarray) for x in read.values())


# ---- Inception's


def test_the_weights_of_inception_are_looked_for_where_pytorch_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    directory = tmp_path / "hub" / "checkpoints"
    with pytest.raises(UserError, match=r"hub/checkpoints; download https://\S+6726825d\.pth \(SHA-256 6726825d"):
        inception.find()
    directory.mkdir(parents=True)
    for name in ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"):
        (directory / name).write_bytes(written({"weight": torch.ones(2)}, True))
        assert inception.find().name == name, "pytorch-fid's file is preferred"
    with pytest.raises(UserError, match=r"has the SHA-256 \w+, which should begin with 6726825d"):
        inception.load()
    with pytest.raises(UserError, match=r"do not fit .*missing: Conv2d_1a_3x3.bn.bias"):
        inception.load(str(directory / name))
    with pytest.raises(UserError, match=r"no Inception weights at nothing\.pth"):
        inception.load("nothing.pth")
