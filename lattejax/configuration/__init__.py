"""Every config key: its default, its type, what it means, and the checks on its value.

`sections` defines the keys. An experiment under configs/ takes `defaults()`, a plain `ml_collections.ConfigDict` with
all of them, and changes what differs; `resolve` turns it into the frozen dataclasses that the rest of the code reads.
An unknown key, a missing key or a value of the wrong type is an error before any work starts. A key that was added
later may be missing if its default keeps the earlier behaviour.
"""

from lattejax.configuration.config import DTYPES, Config
from lattejax.configuration.reading import (
    check_key,
    defaults,
    describe,
    differences,
    known_keys,
    load,
    resolve,
    save,
    to_dict,
)
from lattejax.configuration.sections import Data, Evaluation, Images, Mesh, Profile, Stage

__all__ = [
    "DTYPES",
    "Config",
    "Data",
    "Evaluation",
    "Images",
    "Mesh",
    "Profile",
    "Stage",
    "check_key",
    "defaults",
    "describe",
    "differences",
    "known_keys",
    "load",
    "resolve",
    "save",
    "to_dict",
]
