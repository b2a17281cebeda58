"""Measures speed, beside the limit that the machine sets:

python -m lattejax.benchmark data --config=configs/imagenet256.py

data: latents a second from the loader alone, random ones in the real format. No weights are needed for any of it.
"""

import json

from absl import flags
from ml_collections import config_flags

from lattejax import cli, configuration
from lattejax.data import tokenizer as tokenizers
from lattejax.evaluation import speed
from lattejax.weights.runs import prompt_encoder

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file with get_config().")
RECORDS = flags.DEFINE_integer("records", 20_000, "Of data: records to write and read.", lower_bound=1000)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")
flags.mark_flag_as_required("config")


def main(what: str) -> None:
    config = configuration.resolve(CONFIG.value)
    encoder = prompt_encoder(config, tokenizers.train(speed.make_captions(100), 400))
    result = {"data": speed.data_rate}[what](config, encoder, RECORDS.value)
    for name, value in result.items():
        print(f"{name:24} {value:,.4g}" if isinstance(value, float) else f"{name:24} {value:,}")
    if JSON.value:
        print(json.dumps({"benchmark": what} | result))


if __name__ == "__main__":
    cli.run(main, cli.check_config_flags, commands=("data",))
