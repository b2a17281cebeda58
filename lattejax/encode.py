"""Turns pictures into latents, once, and stores them with their captions and questions for training to read:

python -m lattejax.encode --config=configs/captions256.py --out=latents/captions256

It reads what the config's section `images` names, and encodes it with `data.autoencoder`. The same command resumes
where it was stopped. If the output is complete, it checks every file, adds records that are new, and corrects texts.
Several processes, on one host or on many that share --out, split the work with --worker and --workers.
"""

from absl import flags
from ml_collections import config_flags

from lattejax import cli
from lattejax.encoding.encode import encode
from lattejax.errors import UserError
from lattejax.ranges import Natural, Size
from lattejax.runs.geometry import resolve_config

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config().")
OUT = cli.define_path("out", None, "The directory of the latents, on a local disk.")
WORKER = cli.define_number("worker", 0, "Index of this worker, from 0.", Natural)
WORKERS = cli.define_number("workers", 1, "Number of processes that encode into --out.", Size)
flags.mark_flags_as_required(["config", "out"])


def main() -> None:
    if WORKER.value >= WORKERS.value:
        raise UserError(f"--worker={WORKER.value} must be below --workers={WORKERS.value}; the first is 0")
    complete = encode(resolve_config(CONFIG.value), OUT.value, WORKER.value, WORKERS.value)
    waiting = f"worker {WORKER.value} has finished; {OUT.value} waits for the others"
    print(f"{OUT.value} is complete" if complete else waiting)


if __name__ == "__main__":
    cli.run(main, cli.check_config_flags)
