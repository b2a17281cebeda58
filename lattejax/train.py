"""Trains a run: python -m lattejax.train --config=configs/digits.py --workdir=runs/digits

Any key of the config can be overridden: --config.train.steps=500; --print_config shows all of them. Run the same
command again to resume an interrupted run. Exit code 75 means preempted, 130 Ctrl-C: everything is saved, run the
command again. Exit code 2 means bad input: fix it first.
"""

import json

from absl import flags
from ml_collections import config_flags

from lattejax import cli, configuration
from lattejax.errors import UserError
from lattejax.parallel import hosts
from lattejax.runs.geometry import resolve_config
from lattejax.training.interrupt import InterruptGuard
from lattejax.training.stages import train

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config().")
WORKDIR = cli.define_path("workdir", None, "The run's directory; may be remote (gs://…).")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print every key, mark those that are not default, and exit.")
NOTICE = flags.DEFINE_string("preemption_notice", "", "A URL that answers TRUE when the machine will be preempted.")
connect = cli.define_cluster_flags()
flags.mark_flag_as_required("config")


def main() -> None:
    if PRINT_CONFIG.value:
        return print(configuration.describe(resolve_config(CONFIG.value, weights_needed=False, workdir=WORKDIR.value)))
    if WORKDIR.value is None:
        raise UserError("--workdir is missing: give the directory for the run's files")
    with InterruptGuard(at_once=True, notice=NOTICE.value) as guard:
        connect()  # first: opening a run to start from takes the devices of this process alone
        results = train(resolve_config(CONFIG.value, workdir=WORKDIR.value), WORKDIR.value, guard)
    if hosts.is_first():
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    cli.run(main, cli.check_config_flags)
