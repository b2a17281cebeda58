"""Trains a run: python -m lattejax.train --config=configs/digits.py --workdir=runs/digits

Any key of the config can be overridden: --config.train.steps=500. Run the same command again to go on where an
interrupted run was.
"""

import json
import sys

from absl import flags
from ml_collections import config_flags

from lattejax import cli, configuration
from lattejax.training.interrupt import Interrupted, InterruptGuard
from lattejax.training.stages import train

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps its files; may be remote (gs://…).")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    config = configuration.resolve(CONFIG.value)
    with InterruptGuard(at_once=True) as guard:
        try:
            results = train(config, WORKDIR.value, guard)
        except Interrupted as interrupted:
            print(interrupted, file=sys.stderr)
            sys.exit(interrupted.exit_code)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    cli.run(main, cli.check_config_flags)
