"""The identity of the autoencoder that latents were made with."""

import dataclasses
import json
from typing import Any

from etils import epath

from lattejax.errors import UserError
from lattejax.files import read_json, write_atomically


@dataclasses.dataclass(frozen=True)
class Identity:
    """Latents fit an autoencoder if all of these are equal."""

    sha256: str  # of its weight files' hashes and its geometry, or PIXELS
    scale: float
    shift: float

    @classmethod
    def load(cls, path: epath.Path) -> "Identity":
        """Reads a file that `save` wrote; raises `UserError` if it is invalid."""
        values = read_json(path)
        return cls.parse(values, str(path))

    @classmethod
    def parse(cls, values: Any, where: str) -> "Identity":
        """Checks an identity from a JSON file; `where` names the file."""
        kinds = {"sha256": (str,), "scale": (int, float), "shift": (int, float)}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            raise UserError(f"{where} does not describe the autoencoder of its latents: {values!r:.200}")
        if wrong := [key for key, value in values.items() if type(value) not in kinds[key]]:
            raise UserError(f"{where} describes an autoencoder with a wrong {', '.join(wrong)}: {values!r:.200}")
        return cls(**values)

    def save(self, path: epath.Path) -> None:
        write_atomically(path, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    def check(self, other: "Identity", ours: str | epath.Path, theirs: str) -> None:
        """Raises `UserError` if the two differ; `ours` and `theirs` name them in the message."""
        different = [
            f"{field.name} {getattr(self, field.name)} of {ours}, {getattr(other, field.name)} of {theirs}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        if different:
            raise UserError(f"the latents of {theirs} are not those of {ours}: {'; '.join(different)}")
