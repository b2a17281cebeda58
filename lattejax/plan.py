"""Plans a run for a TPU pod on a machine without one: compiles its train step for the pod's chips, and reports its
memory, communication and time:

python -m lattejax.plan --config=configs/imagenet256.py --topology=v5e:16x16

With --sample it plans the sampler instead. Needs libtpu (docs/sharding.md), but neither data nor weights.
"""

import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu only compiles; it must not look for a TPU

from absl import flags
from ml_collections import config_flags

from lattejax import cli
from lattejax.pods.planning import describe, make_plan
from lattejax.ranges import Size
from lattejax.runs.geometry import resolve_config

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config().")
TOPOLOGY = flags.DEFINE_string("topology", None, "The chips: v4, v5e, v5p or v6e and a shape, e.g. v5e:4x4.")
CAPTIONS = cli.define_number("captions", 1000, "Number of distinct captions, if train.share_contexts is set.", Size)
SAMPLE = flags.DEFINE_bool("sample", False, "Plan a sampling call of eval.batch_size images instead of a train step.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")
flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    plan = make_plan(resolve_config(CONFIG.value, weights_needed=False), TOPOLOGY.value, CAPTIONS.value, SAMPLE.value)
    print(describe(plan))
    if JSON.value:
        print(json.dumps(plan))


if __name__ == "__main__":
    cli.run(main, cli.check_config_flags)
