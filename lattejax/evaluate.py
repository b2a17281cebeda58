"""Evaluates a trained run, or an export, by the scores of its config, or by those that the field publishes:

python -m lattejax.evaluate --workdir=runs/digits --scores=final_digits,held_out_loss --out=scores.json
python -m lattejax.evaluate --workdir=runs/imagenet256 --reference=VIRTUAL_imagenet256_labeled.npz --out=fid.json
python -m lattejax.evaluate --npz=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz --out=fid.json
python -m lattejax.evaluate --make_reference=pictures --image_size=256 --out=reference.npz

Without --reference and --make_reference, it takes --scores, or every score that the run's config lists for the end or
on demand. The figures are printed as JSON. With --out they are also written there, with what determined them, and
pictures beside the file.

With --reference, it draws --num pictures, or reads them from --npz, and computes FID, sFID, Inception Score, precision
and recall; several --guidance and --steps give a table and plots. The same command resumes what was interrupted.
"""

import json
from typing import Annotated, Any

from absl import flags

from lattejax import cli
from lattejax.data.stored import SPLITS
from lattejax.errors import UserError
from lattejax.evaluation.adm import FEWEST, ReferenceFile
from lattejax.evaluation.features import FeatureExtractor
from lattejax.evaluation.pictures import PUBLISHED
from lattejax.files import output_file, read_json, write_atomically, write_with
from lattejax.flow.schedule import Guidance, NumSteps
from lattejax.parallel import hosts
from lattejax.ranges import Range, Seed, Size, range_of
from lattejax.runs.run import Run
from lattejax.scoring.drawn import drawn_points, read_prompts
from lattejax.scoring.parts import computed_on
from lattejax.scoring.points import Point, score_points
from lattejax.scoring.reference import make_reference
from lattejax.scoring.sources import open_reference_source, open_samples
from lattejax.scoring.table import write_table
from lattejax.training.scores import as_json, scores_on_demand, settings_on_demand
from lattejax.weights import inception

WORKDIR = cli.define_path("workdir", None, "A run's directory, an export, or hf://owner/name.")
SCORES = flags.DEFINE_list("scores", [], "Scores: names in the run's config.eval.evaluators, or kinds of score.")
OUT = cli.define_path("out", None, "The .json file to write the figures to; pictures are written beside it.")
MESH = flags.DEFINE_list("mesh", ["data=-1"], "The device mesh, e.g. data=2,fsdp=-1.")

REFERENCE = cli.define_path("reference", None, "The .npz of statistics to compare with, as ADM's evaluator has.")
NPZ = cli.define_path("npz", None, "The pictures to judge, as ADM's evaluator reads them; without it, they are drawn.")
NUM = cli.define_number(
    "num", None, f"The number of pictures; by default {PUBLISHED:,}, or all of --npz.", Annotated[int, Range(10)]
)
GUIDANCE = flags.DEFINE_list("guidance", [], "Guidance scales, each drawn and judged; by default config.eval.guidance.")
STEPS = flags.DEFINE_list("steps", [], "Numbers of sampling steps, likewise; by default config.eval.sample_steps.")
PROMPTS = cli.define_path("prompts", None, "A text file, a prompt on each line; by default those of the run's data.")
CHECKPOINT = cli.define_checkpoint()
SEED = cli.define_number("seed", 0, "Seed of the noise.", Seed)
BATCH_SIZE = cli.define_number("batch_size", None, "Pictures drawn at a time; by default config.eval.batch_size.", Size)
KEEP_PICTURES = flags.DEFINE_bool("keep_pictures", False, "Also write each drawn set as an .npz beside --out.")
INCEPTION = cli.define_path("inception", None, "The Inception weights; by default where PyTorch's tools keep them.")
AUTOENCODER = cli.define_path("autoencoder", None, "The autoencoder of the run or the latents, if it has moved.")
PART = cli.define_number(
    "part", 1000, "Pictures between two points at which the command can resume.", Annotated[int, Range(1, 10_000)]
)

MAKE_REFERENCE = cli.define_path(
    "make_reference",
    None,
    'Makes a --reference of a folder of pictures, an .npz, latents, or of "data": the data of --workdir.',
)
SPLIT = flags.DEFINE_enum("split", "train", SPLITS, "The split of latents or of a run's data.")
IMAGE_SIZE = cli.define_number("image_size", None, "The side of squares that a folder's pictures are cropped to.", Size)
REFERENCE_PICTURES = cli.define_number(
    "reference_pictures",
    10_000,
    "Pictures in the reference itself, for precision and recall.",
    Annotated[int, Range(FEWEST)],
)
connect = cli.define_cluster_flags()

# Which flags each of the uses needs, and may have besides; a flag of its name chooses it, the first of several.
COMMON = {"out", "mesh", "inception", "part"}
USES = {
    "make_reference": (
        {"make_reference", "out"},
        COMMON | {"workdir", "autoencoder", "split", "image_size", "reference_pictures"},
    ),
    "npz": ({"npz", "reference", "out"}, COMMON | {"num"}),
    "reference": (
        {"reference", "out", "workdir"},
        COMMON
        | {"autoencoder", "checkpoint", "num", "guidance", "steps", "prompts", "seed", "batch_size", "keep_pictures"},
    ),
    "scores": ({"workdir"}, {"workdir", "scores", "out", "mesh", "checkpoint"}),
}
OURS = set(USES).union(*(allowed for _, allowed in USES.values()))


def use() -> str:
    """Which of the uses the flags ask for; raises `UserError` if they do not fit it."""
    given = {name for name in OURS if flags.FLAGS[name].present}
    found = next((name for name in USES if name in given), "scores")
    needed, allowed = USES[found]
    if missing := sorted(needed - given):
        instead = ", or --npz" if missing[0] == "workdir" and found == "reference" else ""
        raise UserError(f"--{found} needs --{missing[0]}{instead}" if found in given else f"--{missing[0]} is missing")
    if others := sorted(given - needed - allowed):
        if others[0] in USES:
            raise UserError(f"--{found} and --{others[0]} exclude each other; see --help")
        uses = " or ".join(f"--{name}" for name, accepted in USES.items() if others[0] in set().union(*accepted))
        instead = f", not with --{found}" if found in given else ""
        raise UserError(f"--{others[0]} is used only with {uses}{instead}; leave it out, or see --help")
    return found


def numbers(name: str, texts: list[str], kind: Any) -> list[float]:
    """Reads a flag of several different numbers of an annotated type."""
    of_type, allowed = range_of(kind)
    try:
        found = [of_type(text) for text in texts]
    except ValueError as error:
        raise UserError(f"--{name}={','.join(texts)} must be numbers, as in 1,2,4") from error
    if not all(number in allowed for number in found):
        raise UserError(f"--{name}={','.join(texts)} must be numbers {allowed}")
    if len(set(found)) != len(found):
        raise UserError(f"--{name}={','.join(texts)} has a number twice")
    return found


def extractor() -> FeatureExtractor:
    weights = inception.load(INCEPTION.value or "")
    return FeatureExtractor(weights, cli.read_mesh(MESH.value))


def take_scores() -> None:
    """The scores of the run's config."""
    out = None if OUT.value is None else output_file(OUT.value, ".json")
    if out is not None and out.exists() and "results" in read_json(out):
        raise UserError(f"--out={OUT.value} has scores against a reference; use another file, or add --reference")
    connect()
    run = Run.open(WORKDIR.value, cli.read_mesh(MESH.value), CHECKPOINT.value).pinned()
    types = [run.config.eval.evaluators.get(name, {}).get("type", name) for name in SCORES.value]
    if out is None and "samples" in types:
        raise UserError(
            f"--scores={','.join(SCORES.value)} makes a picture; give --out, which says where it is written"
        )
    report = scores_on_demand(run, SCORES.value)
    figures = as_json(report.figures)
    settings = {} if out is None else settings_on_demand(run, SCORES.value)  # which reads the weights again
    if not hosts.is_first():
        return
    if out is not None:
        record = {"figures": figures, "settings": settings} | computed_on()
        write_atomically(out, (json.dumps(record, indent=2) + "\n").encode())
        for name, picture in report.pictures.items():
            path = out.with_name(f"{out.stem}_{name}.png")
            write_with(path, lambda file, picture=picture: picture.save(file, format="PNG"))
    print(json.dumps(figures, indent=2))


def judge_pictures() -> None:
    """The scores that are published."""
    out = output_file(OUT.value, ".json")
    guidance, steps = numbers("guidance", GUIDANCE.value, Guidance), numbers("steps", STEPS.value, NumSteps)
    inception.find(INCEPTION.value or "")
    connect()
    reference, extract = ReferenceFile.open(REFERENCE.value), extractor()
    if NPZ.value is not None:
        source = open_samples(NPZ.value, PART.value, NUM.value)
        settings = {"num": source.shape[0], "npz_sha256": source.identity, "preprocessing": source.preprocessing}
        points = [Point("npz", settings, source.shape, lambda: source.read)]
    else:
        run = Run.open(WORKDIR.value, extract.mesh, CHECKPOINT.value)
        points = drawn_points(
            run,
            read_prompts(run, PROMPTS.value, AUTOENCODER.value or ""),
            num=PUBLISHED if NUM.value is None else NUM.value,
            guidance=guidance,
            steps=steps,
            seed=SEED.value,
            batch_size=BATCH_SIZE.value,
            autoencoder=AUTOENCODER.value or "",
        )
    results = score_points(points, reference, extract, out, part=PART.value, keep_pictures=KEEP_PICTURES.value)
    if hosts.is_first():
        every = read_json(out)["results"]  # also those of earlier commands; they differ in guidance and steps alone
        print(write_table(out, every) if len(every) > 1 else json.dumps(results[0], indent=2))


def main() -> None:
    wanted = use()
    if wanted == "scores":
        take_scores()
    elif wanted in ("reference", "npz"):
        judge_pictures()
    else:
        out = output_file(OUT.value, ".npz")
        inception.find(INCEPTION.value or "")
        connect()
        source = open_reference_source(
            MAKE_REFERENCE.value,
            workdir=WORKDIR.value,
            split=SPLIT.value if SPLIT.present else None,
            autoencoder=AUTOENCODER.value,
            size=IMAGE_SIZE.value,
            part=PART.value,
        )
        make_reference(source, out, extractor(), pictures=REFERENCE_PICTURES.value, part=PART.value)
        if hosts.is_first():
            print(f"{source.shape[0]:,} pictures, {source.preprocessing}: {out}")


if __name__ == "__main__":
    cli.run(main)
