"""Answers a question about images, streaming the answer as it is decoded:

python -m lattejax.chat --workdir=runs/digits --image=digit.png --question="Which digit is this?"
"""

from absl import flags
from etils import epath
from PIL import Image, UnidentifiedImageError

from lattejax import cli
from lattejax.errors import UserError
from lattejax.models import qwen2_vl
from lattejax.sampling.answers import stream_text
from lattejax.weights.runs import Run, inference_weights

WORKDIR = flags.DEFINE_string("workdir", None, "A run's directory.")
IMAGE = flags.DEFINE_multi_string("image", [], "An image file to look at; may be given several times, or not at all.")
QUESTION = flags.DEFINE_string("question", None, "What to ask.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "The longest answer, in tokens.", lower_bound=1)
flags.mark_flags_as_required(["workdir", "question"])


def read_image(path: str) -> Image.Image:
    """Opens an image file; raises `UserError` where there is none, or what is there is no image."""
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"--image={path}: there is no such file")
    try:
        with file.open("rb") as opened:
            return Image.open(opened).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"--image={path} cannot be read as an image: {error}") from error


def main() -> None:
    run = Run.open(WORKDIR.value)
    images = [run.encoder.read_image(read_image(path)) for path in IMAGE.value]
    prompt = run.encoder.question(QUESTION.value, images)
    vlm = qwen2_vl.unstack(inference_weights(run.config, run.vlm()))
    pieces = stream_text(run.config.model_config.vlm, vlm, run.encoder, prompt, max_tokens=MAX_TOKENS.value)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.run(main)
