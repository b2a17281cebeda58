"""Converts weights: from a Hugging Face checkpoint of Qwen2-VL, by hub id or local directory, to lattejax and back:

python -m lattejax.convert --source=Qwen/Qwen2-VL-2B-Instruct --out=weights/qwen2_vl_2b
python -m lattejax.convert --source=weights/qwen2_vl_2b --to=hf --out=exported/qwen2_vl_2b

and a run's average weights to safetensors, in a directory that `sample` and `chat` read like the run's:

python -m lattejax.convert --source=runs/digits --to=safetensors --out=exported/digits
"""

from absl import flags

from lattejax import cli
from lattejax.weights import pretrained
from lattejax.weights.pretrained import Pretrained
from lattejax.weights.runs import Run

SOURCE = flags.DEFINE_string("source", None, "What to convert: a hub id or a directory.")
OUT = flags.DEFINE_string("out", None, "The directory to make; nothing may be there yet.")
TO = flags.DEFINE_enum(
    "to",
    "lattejax",
    ["lattejax", "hf", "safetensors"],
    "lattejax: from a Hugging Face checkpoint. hf: from such a conversion. safetensors: from a run.",
)
flags.mark_flags_as_required(["source", "out"])


def main() -> None:
    if TO.value == "lattejax":
        pretrained.convert(SOURCE.value, OUT.value)
    elif TO.value == "hf":
        Pretrained.open(SOURCE.value).write_hugging_face(OUT.value)
    else:
        Run.open(SOURCE.value).export(OUT.value)
    print(f"{OUT.value} is whole")


if __name__ == "__main__":
    cli.run(main)
