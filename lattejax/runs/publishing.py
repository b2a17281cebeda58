"""Exporting a run: a directory with its average weights, which opens like the run and is ready for the hub.

README.md        the model card, see `model_card`
model.safetensors, or several files with an index: all weights, the VLM's too; see `exports`
config.json      the run's config
tokenizer/       the tokenizer
autoencoder.json the identity of the latents' autoencoder, whose weights are not copied
generation_config.json, of a converted VLM: how it decodes
"""

from collections.abc import Sequence

import jax
from etils import epath
from flax import traverse_util

from lattejax import configuration
from lattejax.data import tokenizer as tokenizers
from lattejax.data.identity import Identity
from lattejax.errors import UserError
from lattejax.files import check_space, new_directory, resolve_path, write_atomically
from lattejax.models import functional
from lattejax.models.functional import Params
from lattejax.runs import exports, model_card
from lattejax.runs.checkpoints import fingerprints
from lattejax.runs.licences import UNKNOWN, check_licence
from lattejax.runs.results import Result, read_results
from lattejax.runs.run import Run
from lattejax.runs.shapes import abstract_trained
from lattejax.runs.workdir import Workdir
from lattejax.weights import hugging_face, shards
from lattejax.weights.trees import byte_count


def export(run: Run, out: epath.PathLike, licence: str = UNKNOWN, scores: Sequence[str] = ()) -> None:
    """Writes a run's average weights, with a model card.

    Args:
      run: the run, at the checkpoint that is wanted.
      out: the directory to create.
      licence: the hub's identifier of the weights' licence.
      scores: files of `evaluate --workdir --reference --out`, of the same weights.

    Raises:
      UserError: `out` exists or is remote; the run has no checkpoint of the pathway, or a damaged one; the licence is
        unknown; or scores are missing, or of other weights. Nothing is left at `out`.
    """
    check_licence(licence)
    results = read_results(scores)
    shards.check_local(resolve_path(out))
    run = run.pinned()  # never an earlier one than the card says
    with new_directory(out) as directory:
        params = run.params()
        _check_weights(run, params, results)
        params = _as_stored_before(run, params)
        check_space(directory, byte_count(params), f"{out}, with its weights,")
        exports.write(directory, params)
        tokenizers.save(run.encoder.tokenizer, Workdir(directory).tokenizer)
        Identity.load(run.workdir.autoencoder).save(Workdir(directory).autoencoder)
        configuration.save(run.config, Workdir(directory).config)
        if run.generation_file.exists():
            hugging_face.copy_files([run.generation_file], directory)
        card = model_card.write(run, resolve_path(out).name, licence, results, byte_count(params))
        write_atomically(directory / model_card.FILE, card.encode())


def _check_weights(run: Run, params: Params, results: Sequence[Result]) -> None:
    """Raises `UserError` for scores of other weights than these; `evaluate` records their fingerprint."""
    if not results:
        return
    own = fingerprints({"weights": functional.cast_floats(params, run.config.dtype)})["weights"]
    for result in results:
        if result.settings["weights"] != own:
            raise UserError(
                f"the scores of {result.name} are of other weights ({result.settings['weights']:.16}) than those of "
                f"{run.workdir.path} ({own}); take them of the same --checkpoint"
            )


def _as_stored_before(run: Run, params: Params) -> Params:
    """Casts an export's weights back to its dtypes, and what was never trained of a converted VLM to its dtypes there:
    mostly bfloat16, which loses nothing and halves its size."""
    if run.is_export:
        dtypes = shards.Shards.open(run.workdir.path).dtypes
        flat = traverse_util.flatten_dict(params, sep=".")
        return traverse_util.unflatten_dict({name: x.astype(dtypes[name]) for name, x in flat.items()}, sep=".")
    converted = run.converted_vlm()
    if converted is None:
        return params
    trained = traverse_util.flatten_dict(abstract_trained(run.config), sep="/")

    def cast(path: str, x: jax.Array) -> jax.Array:
        part, _, name = path.partition("/")
        return x if part != "vlm" or path in trained else x.astype(converted.dtype(name))

    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({path: cast(path, x) for path, x in flat.items()}, sep="/")
