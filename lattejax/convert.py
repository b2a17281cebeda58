"""Converts weights: Qwen2-VL and autoencoders to lattejax, Qwen2-VL back, and a run to safetensors for the hub.

A Hugging Face checkpoint of Qwen2-VL, by hub id or local directory, to lattejax and back:

python -m lattejax.convert --source=Qwen/Qwen2-VL-2B-Instruct --out=weights/qwen2_vl_2b
python -m lattejax.convert --source=weights/qwen2_vl_2b --to=hf --out=exported/qwen2_vl_2b

an autoencoder, DC-AE or TAESD, with the scale of its latents where the checkpoint does not state it:

python -m lattejax.convert --source=mit-han-lab/dc-ae-f32c32-in-1.0-diffusers --scale=0.3189 --out=weights/dc_ae_in

and a run's average weights to safetensors, with a model card: a directory that is ready for the hub, and that `sample`,
`chat`, `evaluate` and `serve` read like a run's:

python -m lattejax.convert --source=runs/digits --to=safetensors --license=apache-2.0 --out=exported/digits
"""

from absl import flags

from lattejax import cli
from lattejax.errors import UserError
from lattejax.files import check_new
from lattejax.models.autoencoders import Scale, Shift
from lattejax.runs.licences import PAGE, UNKNOWN
from lattejax.runs.publishing import export
from lattejax.runs.run import Run
from lattejax.weights import autoencoders, diffusers, hugging_face, pretrained
from lattejax.weights.pretrained import Pretrained

SOURCE = cli.define_path("source", None, "The checkpoint or run to convert: a hub id or a directory.")
OUT = cli.define_path("out", None, "The directory to create; it must not exist yet, or be empty.")
TO = flags.DEFINE_enum(
    "to",
    "lattejax",
    ["lattejax", "hf", "safetensors"],
    "lattejax: from a Hugging Face checkpoint. hf: from such a conversion. safetensors: from a run.",
)
SCALE = cli.define_number("scale", None, "Scale of an autoencoder's latents; default: as its checkpoint states.", Scale)
SHIFT = cli.define_number("shift", None, "Shift of an autoencoder's latents, before they are scaled.", Shift)
CHECKPOINT = cli.define_checkpoint()
LICENSE = flags.DEFINE_string(
    "license", UNKNOWN, f"The licence of an exported run's weights, as the hub names it: {PAGE}."
)
SCORES = cli.define_paths("scores", "A file of `evaluate --reference --out` for the model card; repeatable.")
flags.mark_flags_as_required(["source", "out"])


def is_autoencoder(source: str) -> bool:
    """Whether the source is an autoencoder, by its config.json; TAESD's own two files have none."""
    directory = hugging_face.find(source, weights=False)
    if not (directory / hugging_face.CONFIG).exists():
        directory = hugging_face.find(source)
    return diffusers.is_autoencoder(directory)


def main() -> None:
    check_new(OUT.value)
    of_autoencoder = TO.value == "lattejax" and is_autoencoder(SOURCE.value)
    if not of_autoencoder and (SCALE.value, SHIFT.value) != (None, None):
        raise UserError("--scale and --shift are only for the conversion of an autoencoder; leave them out")
    for name in ("checkpoint", "license", "scores"):
        if flags.FLAGS[name].present and TO.value != "safetensors":
            raise UserError(f"--{name} is only for the export of a run, --to=safetensors; leave it out")
    if of_autoencoder:
        autoencoders.convert(SOURCE.value, OUT.value, SCALE.value, SHIFT.value)
    elif TO.value == "lattejax":
        pretrained.convert(SOURCE.value, OUT.value)
    elif TO.value == "hf":
        Pretrained.open(SOURCE.value).write_hugging_face(OUT.value)
    else:
        export(Run.open(SOURCE.value, checkpoint=CHECKPOINT.value), OUT.value, LICENSE.value, SCORES.value)
    print(f"{OUT.value} is complete")


if __name__ == "__main__":
    cli.run(main)
