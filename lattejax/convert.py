"""Converts weights: from a Hugging Face checkpoint of Qwen2-VL, by hub id or local directory, to lattejax and back:

python -m lattejax.convert --source=Qwen/Qwen2-VL-2B-Instruct --out=weights/qwen2_vl_2b
python -m lattejax.convert --source=weights/qwen2_vl_2b --to=hf --out=exported/qwen2_vl_2b

an autoencoder, DC-AE or TAESD, with the scale of its latents where the checkpoint does not state it:

python -m lattejax.convert --source=mit-han-lab/dc-ae-f32c32-in-1.0-diffusers --scale=0.3189 --out=weights/dc_ae_in

and a run's average weights to safetensors, in a directory that `sample` and `chat` read like a run's:

python -m lattejax.convert --source=runs/digits --to=safetensors --out=exported/digits
"""

from absl import flags

from lattejax import cli
from lattejax.errors import UserError
from lattejax.models.autoencoders import Scale, Shift
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
flags.mark_flags_as_required(["source", "out"])


def main() -> None:
    of_autoencoder = TO.value == "lattejax" and diffusers.is_autoencoder(hugging_face.find(SOURCE.value))
    if not of_autoencoder and (SCALE.value, SHIFT.value) != (None, None):
        raise UserError("--scale and --shift are only for the conversion of an autoencoder; leave them out")
    if CHECKPOINT.value and TO.value != "safetensors":
        raise UserError("--checkpoint is only for the export of a run, --to=safetensors; leave it out")
    if of_autoencoder:
        autoencoders.convert(SOURCE.value, OUT.value, SCALE.value, SHIFT.value)
    elif TO.value == "lattejax":
        pretrained.convert(SOURCE.value, OUT.value)
    elif TO.value == "hf":
        Pretrained.open(SOURCE.value).write_hugging_face(OUT.value)
    else:
        Run.open(SOURCE.value, checkpoint=CHECKPOINT.value).export(OUT.value)
    print(f"{OUT.value} is complete")


if __name__ == "__main__":
    cli.run(main)
