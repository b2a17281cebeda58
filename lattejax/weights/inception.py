"""The weights of the Inception network of 2015, in the file that pytorch-fid and torch-fidelity download."""

import dataclasses
import hashlib
import os
from pathlib import Path

import jax
from etils import epath

from lattejax.errors import UserError
from lattejax.files import read_bytes, resolve_path
from lattejax.models import functional
from lattejax.models.functional import Params
from lattejax.models.inception import Inception
from lattejax.weights.convolutions import assemble
from lattejax.weights.shards import COUNTER
from lattejax.weights.torch_files import read_tensors

# One file under two names, which end in the first digits of its SHA-256.
URLS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
SHA256 = "6726825d"  # its first digits


@dataclasses.dataclass(frozen=True, eq=False)
class InceptionWeights:
    """The network's weights, and the SHA-256 of their file."""

    params: Params
    sha256: str

    @property
    def are_published(self) -> bool:
        """Whether these are the weights that published scores are computed with."""
        return self.sha256.startswith(SHA256)


def checkpoints_directory() -> Path:
    """Where torch.hub keeps what it downloads."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    return (Path(os.environ.get("TORCH_HOME") or caches) / "hub" / "checkpoints").expanduser()


def find(path: str = "") -> epath.Path:
    """The weights' file: at `path`, or where PyTorch's own tools have left it.

    Raises:
      UserError: there is none; the message says where to get it.
    """
    if path:
        if not resolve_path(path).is_file():
            raise UserError(f"there are no Inception weights at {path}; download {URLS[0]} (SHA-256 {SHA256}…)")
        return resolve_path(path)
    directory = checkpoints_directory()
    for url in URLS:
        if (directory / Path(url).name).is_file():
            return resolve_path(directory / Path(url).name)
    raise UserError(
        f"there are no Inception weights in {directory}; download {URLS[0]} (SHA-256 {SHA256}…) to there, or name the "
        "file with --inception"
    )


def load(path: str = "") -> InceptionWeights:
    """Reads the weights, see `find`.

    Raises:
      UserError: there are none, or they are not this network's; or those of the usual place, which is not asked for by
        name, are not the published ones.
    """
    file = find(path)
    data = read_bytes(file)
    sha256 = hashlib.sha256(data).hexdigest()
    if not path and not sha256.startswith(SHA256):
        raise UserError(f"{file} has the SHA-256 {sha256}, which should begin with {SHA256}; download it again")
    tensors = {name: x for name, x in read_tensors(data, str(file)).items() if not name.endswith(COUNTER)}
    abstract = jax.eval_shape(lambda: functional.init(Inception, key=jax.random.key(0)))
    params = assemble(abstract, {name: x.shape for name, x in tensors.items()}, tensors.__getitem__, file)
    return InceptionWeights(params, sha256)
