"""Trains a run: python -m lattejax.train --config=configs/digits.py --workdir=runs/digits

Any key of the config can be overridden: --config.train.steps=500. Run the same command again to go on where an
interrupted run was.
"""

import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lattejax import cli, configuration
from lattejax.errors import UserError
from lattejax.training.interrupt import Interrupted, InterruptGuard
from lattejax.training.stages import train

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its files; may be remote (gs://…).")
flags.mark_flags_as_required(["config", "workdir"])


def check_config_flags(arguments: list[str]) -> None:
    """Refuses a config file that is not there, and overrides of keys that no config has, before they are parsed."""
    for argument in arguments:
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config" and value and not Path(value.partition(":")[0]).is_file():
            raise UserError(f"--config={value}: there is no such file")
        if name.startswith("config."):
            configuration.check_key(name.removeprefix("config."))


def main() -> None:
    config = configuration.resolve(CONFIG.value)
    with InterruptGuard() as guard:
        try:
            results = train(config, WORKDIR.value, guard)
        except Interrupted as interrupted:
            print(interrupted, file=sys.stderr)
            sys.exit(128 + interrupted.signum)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    cli.run(main, check_config_flags)
