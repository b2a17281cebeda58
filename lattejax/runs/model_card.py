"""The model card of an exported run: the README.md that the Hugging Face hub shows.

It says what is known, and that what is not known is not. The front matter's model-index, which the hub compares with
other models', has only scores that may be published as FID-50K; all others are in the text, with what limits them.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import lattejax
from lattejax.configuration.reading import VERSION
from lattejax.data.digits import REQUEST
from lattejax.errors import UserError, one_line, parsing
from lattejax.files import read_json, resolve_path
from lattejax.models.autoencoders import PIXELS
from lattejax.models.functional import parameter_count
from lattejax.runs.data_facts import DataFacts, data_facts
from lattejax.runs.licences import OTHER, PAGE, UNKNOWN
from lattejax.runs.results import Result, final_scores
from lattejax.runs.run import Run
from lattejax.runs.shapes import abstract_params, abstract_trained
from lattejax.weights import autoencoders, hugging_face

FILE = "README.md"
PAPER = "[LaTtE-Flow](https://arxiv.org/abs/2506.06952)"
TASK = "text-to-image"
FIGURES = {  # of `evaluate --reference`
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
}


def write(run: Run, name: str, licence: str, results: Sequence[Result], size: int) -> str:
    """The card's text.

    Args:
      run: the run, at the checkpoint that is exported.
      name: the model's name.
      licence: one of `licences.IDENTIFIERS`.
      results: scores of these weights by `evaluate`.
      size: bytes of the weights.
    """
    data, base = data_facts(run), _base_model(run)
    front = ModelCardData(
        license=licence,
        library_name="lattejax",
        pipeline_tag="any-to-any",
        base_model=base or None,
        datasets=[data.hub_id] if data.hub_id else None,
        tags=["latte-flow", "flow-matching", "jax", TASK],
        model_name=name,
        eval_results=[each for result in results if not result.monitor for each in _index(result)] or None,
    )
    sections = {
        "Model": _model(run, base, size),
        "Data": _data(data),
        "Scores": _scores(run, results),
        "Use": _use(run),
        "Licence": _licence(licence, base),
    }
    text = "\n\n".join(f"## {title}\n\n{section}" for title, section in sections.items())
    intro = (
        f"A {PAPER} model of lattejax, an independent implementation in JAX: a vision-language model that also draws."
    )
    return f"---\n{front.to_yaml()}\n---\n\n# {_plain(name)}\n\n{intro}\n\n{text}\n"


# ---- Sections


def _model(run: Run, base: str, size: int) -> str:
    config, weights = run.config, abstract_params(run.config)
    generation = config.model_config.generation
    average = f"their moving average, decay {config.train.ema_decay:g}" if config.train.ema_decay else "as trained"
    shared = config.model_config.shares_layers
    sizes = sorted({own.stop - own.start for own in generation.layers_of})
    written = read_json(run.workdir.config).get(VERSION, "an earlier version")
    return _table(
        ("", ""),
        [
            ("variant", "Blend: image and text share the VLM's layers" if shared else "Couple: the VLM is frozen"),
            ("VLM", f"{parameter_count(weights['vlm']):,} parameters, {base or 'of the architecture of Qwen2-VL'}"),
            ("trained to draw", f"{parameter_count(abstract_trained(config)):,} parameters; {average}"),
            ("steps of that training", "not known here" if run.is_export else f"{run.trained_step:,}"),
            ("layers", f"{generation.text.num_layers}, in {generation.num_groups} timestep-expert groups of "
             f"{' or '.join(map(str, sizes))}; a sampling step runs one group"),
            ("pictures", f"{config.data.image_size}×{config.data.image_size} pixels"),
            ("latents", f"{'×'.join(map(str, config.data.latent_shape))}, {_autoencoder(run)[0]}"),
            ("weights in this repository", f"{size / 1e6:,.1f} MB, those of the VLM among them"),
            ("computation", config.dtype),
            ("trained with", f"lattejax {written}; exported with {lattejax.__version__}"),
        ],
    )  # fmt: skip


def _data(data: DataFacts) -> str:
    if data.problem:
        return f"Trained on {_plain(data.name)}. How many pictures is not known: {data.problem}."
    mirrored = ", each also mirrored" if data.mirrored else ""
    return f"Trained on {_plain(data.name)}: {data.pictures:,} pictures to draw{mirrored}."


def _scores(run: Run, results: Sequence[Result]) -> str:
    published = [result for result in results if not result.monitor]
    monitors = [result for result in results if result.monitor]
    own = {}
    if not run.is_export and run.trained_step == run.config.train.steps:  # the weights that they were taken of
        own = final_scores(run.workdir.results)
    parts = []
    if published:
        parts += ["### FID-50K", "Computed as ADM's evaluator does.", *_judged(published)]
    if monitors:
        warning = "**These are monitors, and not to be compared with published scores.** They compare checkpoints."
        parts += ["### Monitors", warning, *_judged(monitors)]
    if own:
        parts += ["### Of the run itself", *_own(run, own)]
    return "\n\n".join(parts or ["None were taken of these weights."])


def _judged(results: Sequence[Result]) -> Iterator[str]:
    names = [name for name in FIGURES if any(name in result.figures for result in results)]
    yield _table(
        ("pictures", "guidance", "steps", *(FIGURES[name] for name in names)),
        [
            (
                f"{result.settings['num']:,}",
                f"{result.settings['guidance']:g}",
                str(result.settings["num_steps"]),
                *(_figure(result.figures.get(name)) for name in names),
            )
            for result in results
        ],
    )
    if len(results) > 1:
        yield f"{len(results)} sets of drawings were judged. The best of several scores flatters."
    yield from dict.fromkeys(map(_what_determined, results))


def _what_determined(result: Result) -> str:
    own, about = result.settings, result.described
    facts = {
        "only a monitor because": "; ".join(result.monitor),
        "reference": f"{result.reference} ({own['reference_sha256'][:16]}): {result.reference_description}",
        "Inception": f"{own['inception_sha256'][:16]}, {about['inception_precision']}",
        "drawings": f"{own['image_size']} pixels, in {own['dtype']}, solver {own['solver']}, shift {own['shift']:g}, "
        f"guided in {own['guidance_interval']}, seed {own['seed']}, {own['quantisation']}",
        "prompts": f"{own['num_prompts']:,}, of {own['prompts']} ({own['prompts_sha256'][:16]})",
        "weights": own["weights"],
        "computed on": about["device"],
        "by": f"lattejax {about['lattejax_version']}, jax {about['jax_version']}",
    }
    return "\n".join(f"- {key}: {_plain(value)}" for key, value in facts.items() if value)


def _own(run: Run, figures: dict[str, float]) -> Iterator[str]:
    taken = {name: each for name, each in run.config.eval.evaluators.items() if each.get("at") == "end"}
    sampling = run.config.eval.sampling
    yield (
        "Taken when the training ended. They compare runs of lattejax, and are no benchmark; a model that judges its "
        "own drawings (`asked`) agrees with itself, and `fid_…` are monitors."
    )
    yield _table(("figure", "value"), [(name, _figure(value)) for name, value in figures.items()])
    if taken:
        settings = [(name, f"`{json.dumps(dict(each))}`") for name, each in taken.items()]
        yield _table(("score", "settings"), settings)
    yield (
        f"Where a score draws, it takes {sampling.num_steps} steps, solver {sampling.solver}, in {run.config.dtype}, "
        f"at guidance scale {sampling.guidance:g} unless its settings list others. The device was not recorded."
    )


def _use(run: Run) -> str:
    config, (_, conversion) = run.config, _autoencoder(run)
    sampling, pictures = config.eval.sampling, config.data.prompts == "pictures"
    prompt = REQUEST if pictures else config.eval.prompts[0]
    draw = [
        "python -m lattejax.sample --workdir=.",
        f"--prompt={shlex.quote(prompt)}",
        *(["--image=picture.png"] if pictures else []),
        f"--guidance={sampling.guidance:g} --steps={sampling.num_steps}",
        *(["--autoencoder=autoencoder"] if config.data.autoencoder != PIXELS else []),
        "--num=4 --out=drawn.png",
    ]
    lines = [conversion] if conversion else []
    lines += [" ".join(draw), 'python -m lattejax.chat --workdir=. --image=drawn.png --question="What is this?"']
    needs = ""
    if config.data.autoencoder != PIXELS and not conversion:
        sha256 = autoencoders.Identity.load(run.workdir.autoencoder).sha256
        needs = (
            f"\n\nDrawing needs the latents' autoencoder, converted ({sha256[:16]}), in the directory `autoencoder`."
        )
    return (
        "With lattejax installed, in a copy of this repository:\n\n```bash\n"
        + "\n".join(lines)
        + "\n```\n\n`--workdir=hf://<owner>/<name>` downloads the repository, and reads it from the hub's cache."
        + needs
    )


def _licence(licence: str, base: str) -> str:
    if licence == UNKNOWN:
        text = "Nobody has said under which licence these weights may be used."
    elif licence == OTHER:
        text = "See the file `LICENSE` of this repository."
    else:
        text = f"`{licence}`, [as the hub names it]({PAGE})."
    return f"{text} The weights of {base} are in this repository, under their own licence." if base else text


# ---- Facts


def _base_model(run: Run) -> str:
    """The hub id of the VLM's checkpoint, if the run used it unchanged; else empty. An export has it from its card."""
    if run.is_export:
        card = run.workdir.path / FILE
        with parsing(f"the model card {card}"):
            known = ModelCard(card.read_text()).data.base_model if card.exists() else None
        return known if isinstance(known, str) else ""
    converted = run.converted_vlm()
    return hugging_face.hub_id(converted.record) if converted is not None else ""


def _autoencoder(run: Run) -> tuple[str, str]:
    """What the latents are of, and the command that converts their autoencoder, if it is known and needed."""
    path = run.config.data.autoencoder
    if path == PIXELS:
        return "the pixels themselves", ""
    try:
        run.open_autoencoder()
        record = read_json(resolve_path(path) / autoencoders.RECORD)
    except UserError:
        return "of an autoencoder that was not there when this card was written", ""
    if not (source := hugging_face.hub_id(record)):
        return "of an autoencoder that is not from the hub", ""
    shift = f" --shift={record['shift']}" if record["shift"] else ""
    command = f"python -m lattejax.convert --source={source} --scale={record['scale']}{shift} --out=autoencoder"
    return f"of {source}", command


def _index(result: Result) -> Iterator[EvalResult]:
    """A publishable result's entries in the model-index."""
    own, sha256 = result.settings, result.settings["reference_sha256"][:12]  # files of one name may differ
    args = {
        "pictures": own["num"],
        "guidance": own["guidance"],
        "steps": own["num_steps"],
        "solver": own["solver"],
        "precision": result.described["inception_precision"],
        "device": result.described["device"],
    }
    for name, value in result.figures.items():
        yield EvalResult(
            task_type=TASK,
            dataset_type=re.sub(r"\W+", "-", f"{result.reference.removesuffix('.npz')}-{sha256}").lower(),
            dataset_name=f"{result.reference} ({sha256})",
            metric_type=name,
            metric_name=FIGURES.get(name, name),
            metric_value=value,
            metric_args=args,
        )


# ---- Markdown


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """A text on one line, which cannot end a cell of a table or begin a tag."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")


def _figure(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}"
