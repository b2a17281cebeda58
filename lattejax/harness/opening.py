"""Opening what `workdir` names, and pixel limits."""

from lattejax.data.prompts import PromptEncoder
from lattejax.errors import UserError
from lattejax.files import resolve_path
from lattejax.flow.schedule import Sampling
from lattejax.ranges import LARGEST
from lattejax.runs.run import Run
from lattejax.sampling.answers import Answerer
from lattejax.sampling.images import ImageSampler
from lattejax.weights.pretrained import is_converted


def open_model(
    workdir: str, checkpoint: str, dtype: str, autoencoder: str, draws: bool
) -> tuple[Answerer, ImageSampler | None, Sampling]:
    """Reads a run, an export or converted weights; a sampler only if it `draws`. Returns also how the run draws.

    Raises:
      UserError: there is no such thing, or it cannot do what is asked.
    """
    directory = resolve_path(workdir)
    if is_converted(directory):
        if draws or checkpoint or autoencoder:
            raise UserError(f"{workdir} holds a converted VLM, which answers and has no checkpoint; give a run to draw")
        return Answerer.load(workdir, dtype or "bfloat16"), None, Sampling()
    if (directory / "preprocessor_config.json").exists():
        raise UserError(
            f"{workdir} is a checkpoint of transformers; convert it first: python -m lattejax.convert "
            f"--source={workdir} --out=…"
        )
    run = Run.open(workdir, checkpoint=checkpoint)
    if dtype not in ("", run.config.dtype):
        raise UserError(f"dtype={dtype} is for converted weights; the run {workdir} computes in {run.config.dtype}")
    usual = run.config.eval.sampling
    if not draws:
        return Answerer.of(run), None, usual
    sampler = ImageSampler.of(run, run.params(run.config.dtype), autoencoder)
    return Answerer(sampler.config.vlm, sampler.vlm, sampler.encoder, run.generation.repetition_penalty), sampler, usual


def limit_pixels(encoder: PromptEncoder, least: int | None, most: int | None) -> None:
    """Sets the bounds to which images are resized; None: as they are.

    Raises:
      UserError: they are no rising numbers.
    """
    size = encoder.processor.size
    low, high = size["shortest_edge"] if least is None else least, size["longest_edge"] if most is None else most
    if not all(type(number) is int and 0 < number <= LARGEST for number in (low, high)) or low > high:
        raise UserError(f"min_pixels={low!r} and max_pixels={high!r} must be rising numbers of pixels")
    encoder.processor.size = {"shortest_edge": low, "longest_edge": high}
