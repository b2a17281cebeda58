"""Which autoencoder latents are of."""

import dataclasses
import json

from etils import epath

from lattejax.errors import UserError
from lattejax.files import read_json, write_whole


@dataclasses.dataclass(frozen=True)
class Identity:
    """What makes latents fit an autoencoder."""

    sha256: str  # of its weight files' hashes and its geometry, or PIXELS
    scale: float
    shift: float

    @classmethod
    def load(cls, path: epath.Path) -> "Identity":
        """Reads what `save` has written; raises `UserError` where it cannot be read."""
        values = read_json(path)
        if values.keys() != {field.name for field in dataclasses.fields(cls)}:
            raise UserError(f"{path} does not say which autoencoder its latents are of: {values!r:.200}")
        return cls(**values)

    def save(self, path: epath.Path) -> None:
        write_whole(path, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    def check(self, other: "Identity", ours: str | epath.Path, theirs: str) -> None:
        """Raises `UserError` where the two differ, naming whose they are."""
        different = [
            f"{field.name} {getattr(self, field.name)} of {ours}, {getattr(other, field.name)} of {theirs}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if different:
            raise UserError(f"the latents of {theirs} are not those of {ours}: {'; '.join(different)}")
