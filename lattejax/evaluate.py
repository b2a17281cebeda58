"""Evaluates a trained run, or an export:

python -m lattejax.evaluate --workdir=runs/digits --scores=final_digits,held_out_loss --out=scores.json

Without --scores, it takes every score that the run's config lists for the end or on demand. The figures are printed as
JSON. With --out they are also written there, with pictures beside the file.
"""

import json

from absl import flags

from lattejax import cli
from lattejax.files import output_file, write_atomically, write_with
from lattejax.parallel import hosts
from lattejax.runs.run import Run
from lattejax.training.scores import as_json, scores_on_demand

WORKDIR = cli.define_path("workdir", None, "A run's directory, or an export.")
SCORES = flags.DEFINE_list("scores", [], "Scores: names in the run's config.eval.evaluators, or kinds of score.")
OUT = cli.define_path("out", None, "The .json file to write the figures to; pictures are written beside it.")
MESH = flags.DEFINE_list("mesh", ["data=-1"], "The device mesh, e.g. data=2,fsdp=-1.")
connect = cli.define_cluster_flags()
flags.mark_flag_as_required("workdir")


def main() -> None:
    out = None if OUT.value is None else output_file(OUT.value, ".json")
    connect()
    report = scores_on_demand(Run.open(WORKDIR.value, cli.read_mesh(MESH.value)), SCORES.value)
    if not hosts.is_first():
        return
    text = json.dumps(as_json(report.figures), indent=2)
    if out is not None:
        write_atomically(out, (text + "\n").encode())
        for name, picture in report.pictures.items():
            path = out.with_name(f"{out.stem}_{name}.png")
            write_with(path, lambda file, picture=picture: picture.save(file, format="PNG"))
    print(text)


if __name__ == "__main__":
    cli.run(main)
