"""What can be said of a run's data without looking at its records."""

import dataclasses
import re

from etils import epath

from lattejax.data.examples import seen_drawings
from lattejax.data.stored import MANIFEST
from lattejax.errors import UserError
from lattejax.files import read_json, resolve_path
from lattejax.runs.data import open_data
from lattejax.runs.run import Run


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """A run's data; `problem` says why it could not be looked at."""

    name: str
    pictures: int = 0  # that are drawn, of the training split; 0: unknown
    mirrored: bool = False  # each is there a second time, mirrored
    hub_id: str = ""
    problem: str = ""


def data_facts(run: Run) -> DataFacts:
    """Looks at the data of a run, unless it has moved or changed since."""
    data = run.config.data
    unknown = "scikit-learn's handwritten digits" if data.source == "digits" else "latents that `encode` has written"
    if not run.workdir.data.exists():
        return DataFacts(unknown, problem="an export does not record its data")
    try:
        source = open_data(run.config)
        if read_json(run.workdir.data).get("identity") not in source.identities:
            return DataFacts(unknown, problem="it has changed since the training")
        drawings = source.drawings("train", run.encoder)
        seen = seen_drawings(run.config, drawings)
        pictures = len(drawings) if seen is None else len(seen)
    except UserError:
        return DataFacts(unknown, problem="it could not be opened when this card was written")
    if data.source == "digits":
        return DataFacts(unknown, pictures)
    encoding = read_json(resolve_path(data.latents) / MANIFEST)["encoding"]
    name, mirrored = str(encoding.get("source", unknown)), bool(encoding["flip"])
    facts = DataFacts(name, pictures // (1 + mirrored), mirrored)
    named = re.fullmatch(r"the data set ([^:]+)(:.+)?", name)
    if named and (named[1].startswith(("/", "~", ".")) or resolve_path(named[1]).exists()):
        return dataclasses.replace(facts, name=f"the data set {epath.Path(named[1]).name}")  # not its directory
    if named and re.fullmatch(r"[\w.-]+/[\w.-]+", named[1]):
        return dataclasses.replace(facts, hub_id=named[1])
    return facts
