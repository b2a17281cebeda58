"""Answers a question about images, streaming the answer as it is decoded:

python -m lattejax.chat --workdir=runs/digits --image=digit.png --question="Which digit is this?"
"""

from absl import flags

from lattejax import cli
from lattejax.data.prompts import open_image
from lattejax.sampling.answers import stream_text
from lattejax.weights.runs import Run, inference_weights

WORKDIR = flags.DEFINE_string("workdir", None, "A run's directory.")
IMAGE = flags.DEFINE_multi_string("image", [], "An image file to look at; may be given several times, or not at all.")
QUESTION = flags.DEFINE_string("question", None, "What to ask.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "The longest answer, in tokens.", lower_bound=1)
flags.mark_flags_as_required(["workdir", "question"])


def main() -> None:
    run = Run.open(WORKDIR.value)
    images = [run.encoder.read_image(open_image(path)) for path in IMAGE.value]
    prompt = run.encoder.question(QUESTION.value, images)
    vlm = inference_weights(run.config, {"vlm": run.vlm()})["vlm"]
    pieces = stream_text(run.config.model_config.vlm, vlm, run.encoder, prompt, max_tokens=MAX_TOKENS.value)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.run(main)
