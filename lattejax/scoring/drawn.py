"""The sets of pictures that a run draws: one for each guidance scale and number of steps."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

from lattejax.errors import UserError
from lattejax.evaluation.sample_sets import OF_A_FILE, Asked, SetDrawer
from lattejax.files import read_text, resolve_path
from lattejax.runs.checkpoints import fingerprints
from lattejax.runs.data import open_data
from lattejax.runs.run import Run
from lattejax.sampling.images import ImageSampler
from lattejax.scoring.points import Point
from lattejax.scoring.sources import QUANTISATION


def read_prompts(run: Run, path: str | None, autoencoder: str = "") -> Asked:
    """The prompts in a text file, one on each line, or those of the run's data, for which see `open_data`.

    Raises:
      UserError: the file has none, or a line is empty.
    """
    if path is None:
        return Asked.of_data(run.config, open_data(run.config, autoencoder), run.encoder)
    lines = read_text(resolve_path(path)).splitlines()
    if not lines or not all(map(str.strip, lines)):
        raise UserError(f"--prompts={path} must have a prompt on each line, and no empty line")
    return Asked.texts(run.encoder, lines, OF_A_FILE)


def drawn_points(
    run: Run,
    asked: Asked,
    *,
    num: int,
    guidance: Sequence[float],
    steps: Sequence[int],
    seed: int,
    batch_size: int | None,
    autoencoder: str = "",
) -> list[Point]:
    """The sets of `num` pictures for all guidance scales and numbers of steps.

    Args:
      run: opened on the mesh that draws.
      asked: the prompts; picture i has prompt i modulo their number.
      num: pictures in each set.
      guidance: guidance scales; empty: that of config.eval.
      steps: numbers of steps; empty: that of config.eval.
      seed: the seed of the noise.
      batch_size: pictures drawn at a time; None: config.eval.batch_size.
      autoencoder: see `ImageSampler.load`.

    Raises:
      UserError: the run cannot draw, or a number is out of its range.
    """
    run = run.pinned()
    config = run.config
    params = run.params(config.dtype)
    identity = fingerprints({"weights": params})["weights"]
    sampler = ImageSampler.of(run, params, autoencoder)
    common = {
        "num": num,
        "seed": seed,
        "prompts": asked.what,
        "num_prompts": asked.count,
        "prompts_sha256": asked.identity,
        "encoded_prompts_sha256": asked.encoded_identity(min(num, asked.count)),  # by the tokenizer and chat template
        "weights": identity,
        "model_sha256": hashlib.sha256(repr(config.model_config).encode()).hexdigest(),
        "trained_steps": None if run.is_export else run.trained_step,
        "autoencoder": run.open_autoencoder(autoencoder).identity.sha256,
        "dtype": config.dtype,
        "image_size": config.data.image_size,
        "quantisation": QUANTISATION,
        "preprocessing": "none: drawn at this size",
    }
    shape = (num, config.data.image_size, config.data.image_size, 3)
    size = config.eval.batch_size if batch_size is None else batch_size
    points = []
    for scale in guidance or (config.eval.guidance,):
        for count in steps or (config.eval.sample_steps,):
            try:
                sampling = dataclasses.replace(config.eval.sampling, guidance=scale, num_steps=count)
            except ValueError as error:
                raise UserError(f"--guidance or --steps: {error}") from error
            make = functools.partial(SetDrawer, sampler, asked, sampling, batch_size=size, seed=seed)
            settings = common | dataclasses.asdict(sampling)
            points.append(Point(f"guidance_{scale:g}_steps_{count}", settings, shape, make))
    return points
