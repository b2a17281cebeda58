"""Trains and evaluates variants of a config one after another, and compares them:

python -m lattejax.sweep --config=configs/ablations.py --workdir=runs/ablations

Run the same command again to resume an interrupted sweep. Keys of the base config can be overridden, as in
--config.base.train.steps=500, and the seeds: --config.seeds=0,1.
"""

from absl import flags
from ml_collections import config_flags

from lattejax import cli
from lattejax.sweeps.definition import resolve_sweep
from lattejax.sweeps.sweep import run_sweep
from lattejax.training.interrupt import InterruptGuard

CONFIG = config_flags.DEFINE_config_file("config", None, "The sweep: a file with get_config().")
WORKDIR = cli.define_path("workdir", None, "The directory of the sweep's runs, table and plots.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    sweep = resolve_sweep(CONFIG.value, WORKDIR.value)
    with InterruptGuard(at_once=True) as guard:
        print(run_sweep(sweep, WORKDIR.value, guard))


if __name__ == "__main__":
    cli.run(main, lambda arguments: cli.check_config_flags(arguments, "base.", ("seeds", "sample_steps")))
