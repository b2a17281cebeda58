"""Settings before JAX is imported, for tests and the processes they start: they compile much and compute little."""

import atexit
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import jaxtyping
import pytest

FASTER_TO_COMPILE = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib") < "0.11":  # newer versions fail on unknown flags
    # The older emitters; and no threads that divide a program's code among them, as all cores are busy anyway.
    FASTER_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

os.environ["JAX_PLATFORMS"] = "cpu"
if FASTER_TO_COMPILE not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FASTER_TO_COMPILE}"
# Test workers, and runs that tests start, compile the same programs repeatedly.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lattejax-test-cache-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.0"

# No test asks the hub: what they look up there lies in its cache, or is missing.
os.environ["HF_HUB_OFFLINE"] = "1"

# Signatures of the code on arrays are checked, shapes included; not in the processes that tests start, and not in the
# rest of the package, where it would cost time and tell little. An int passes for a float (PEP 484).
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
CHECKED = ("models", "flow", "objectives", "sampling", "parallel", "training.step")
jaxtyping.install_import_hook([f"lattejax.{name}" for name in CHECKED], CHECKER)


@pytest.fixture(scope="session")
def forked_command():
    """Runs a command as a user would, without waiting for its imports."""
    from tests.helpers import Forks  # imports JAX

    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """What an earlier version wrote: a run, an export, a sweep, latents; see tests/earlier/README.md."""
    from tests.helpers import ROOT  # imports JAX

    directory = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ROOT / "tests" / "earlier" / "3672460.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture(scope="module")
def ports(tmp_path_factory, monkeypatch_module):
    """torch-fidelity and pytorch-fid, installed apart and without torchvision, of which they need a few names.

    Beside PyTorch for the CPU, PyPI's torchvision cannot be imported, and transformers fails where it is installed.
    """
    directory = tmp_path_factory.mktemp("ports")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"--target={directory}"]
    subprocess.run([*command, "torch-fidelity==0.4.0", "pytorch-fid==0.3.0"], check=True)
    monkeypatch_module.syspath_prepend(str(directory))
    names = ["", ".models", ".models.inception", ".datasets", ".transforms", ".transforms.functional"]
    for name in names:
        module = types.ModuleType(f"torchvision{name}")
        monkeypatch_module.setitem(sys.modules, module.__name__, module)
        if name:
            parent, _, last = module.__name__.rpartition(".")
            setattr(sys.modules[parent], last, module)
    sys.modules["torchvision"].__version__ = "0"
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(sys.modules["torchvision.datasets"], name, object)
    fidelity = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    # pytorch-fid overrides the forward passes of torchvision's blocks, whose parts torch-fidelity's have too.
    blocks = sys.modules["torchvision.models.inception"]
    blocks.InceptionA, blocks.InceptionC, blocks.InceptionE = (
        fidelity.InceptionA,
        fidelity.InceptionC,
        fidelity.InceptionE_1,
    )
    return fidelity, importlib.import_module("pytorch_fid.inception")


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch
