"""Comparing the runs of a sweep: a table, as CSV and Markdown, and plots.

Everything is read from files: the runs' `results.json` and `metrics.jsonl`, and the sweep's `sampling.json`. Figures
are means over seeds, with the sample standard deviation if there are several.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from lattejax.files import read_json, write_atomically, write_with
from lattejax.runs.records import read_records
from lattejax.runs.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_SCORES = ("stage", "step", "seconds", "variant", "steps", "seconds_per_image")  # keys of a record


def common_scores(records: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the figures that all records have, in the first record's order, without vectors."""
    first, *others = records
    return [
        name
        for name, value in first.items()
        if isinstance(value, int | float) and name not in NOT_SCORES and all(name in other for other in others)
    ]


def _curves(records: Sequence[dict[str, Any]]) -> list[str]:
    """The scores to plot: those that all records have, but for what never changes, as a reader's own accuracy."""
    known = common_scores(records)
    return [name for name in known if len({record[name] for record in records}) > 1] or known


def write_comparison(directory: epath.Path, runs: dict[tuple[str, int], Run]) -> str:
    """Writes the table and the plots of finished runs (by variant and seed); returns the table as Markdown."""
    variants = list(dict.fromkeys(name for name, _ in runs))
    evaluations = {key: _evaluations(run) for key, run in runs.items()}
    sampling = read_json(directory / "sampling.json")["draws"]
    results = {key: read_json(run.workdir.results) for key, run in runs.items()}
    columns, rows = common_scores(results.values()), []
    for variant in variants:
        own = [key for key in runs if key[0] == variant]
        scores = [results[key] for key in own]
        rows.append({"variant": variant, "seeds": len(own)})
        for name in columns:
            values = [score[name] for score in scores]
            rows[-1] |= {name: np.mean(values), f"{name}_std": np.std(values, ddof=1) if len(values) > 1 else np.nan}
    write_atomically(directory / "table.csv", _csv(rows).encode())
    table = _markdown(rows, columns)
    write_atomically(directory / "table.md", table.encode())
    figures = {
        "score_by_training_steps": _by_training_steps(variants, evaluations),
        "score_by_sampling_time": _by_sampling_time(variants, sampling),
        "loss_by_group": _by_group(variants, evaluations, runs),
    }
    for name, figure in figures.items():
        write_with(directory / f"{name}.png", lambda file, figure=figure: figure.savefig(file, format="png", dpi=120))
    return table


def _evaluations(run: Run) -> list[dict[str, Any]]:
    """The second stage's evaluations, in order."""
    return [record for record in read_records(run.workdir.metrics) if "held_out_loss" in record]


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _markdown(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    def cell(row: dict[str, Any], name: str) -> str:
        spread = row[f"{name}_std"]
        return f"{row[name]:.4f}" + ("" if np.isnan(spread) else f" ± {spread:.4f}")

    lines = [f"| variant | seeds | {' | '.join(name.replace('_', ' ') for name in columns)} |"]
    lines.append("| --- " * (len(columns) + 2) + "|")
    for row in rows:
        lines.append(f"| {' | '.join([row['variant'], str(row['seeds']), *(cell(row, name) for name in columns)])} |")
    return "\n".join(lines) + "\n"


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # slow to import

    return Figure(figsize=(width, height), layout="constrained")


def _panels(scores: Sequence[str]) -> tuple["Figure", list["Axes"]]:
    """A figure, and axes in it for each score, in rows of three."""
    rows, columns = -(-len(scores) // 3), min(3, len(scores))
    figure = new_figure(4.3 * columns, 4 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[len(scores) :]:
        unused.remove()
    for axes, score in zip(panels, scores, strict=False):
        axes.set_title(score.replace("_", " "))
    return figure, panels[: len(scores)]


def _by_training_steps(variants: Sequence[str], evaluations: dict) -> "Figure":
    """Scores by training step: the mean over seeds, and their range."""
    known = _curves([record for own in evaluations.values() for record in own])
    figure, panels = _panels(known)
    for axes, score in zip(panels, known, strict=True):
        for variant in variants:
            curves = [own for (name, _), own in evaluations.items() if name == variant]
            steps = [record["step"] for record in curves[0]]
            values = np.array([[record[score] for record in curve] for curve in curves])
            (line,) = axes.plot(steps, values.mean(axis=0), marker="o", markersize=3, label=variant)
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.15, color=line.get_color())
        axes.set_xlabel("training steps")
    axes.legend(fontsize="small")
    return figure


def _by_sampling_time(variants: Sequence[str], sampling: Sequence[dict[str, Any]]) -> "Figure":
    """Scores of one run of each variant by time per image, with a marker for each number of steps."""
    known = _curves(sampling)
    figure, panels = _panels(known)
    for axes, score in zip(panels, known, strict=True):
        for variant in variants:
            own = sorted((r for r in sampling if r["variant"] == variant), key=lambda record: record["steps"])
            milliseconds = [1000 * record["seconds_per_image"] for record in own]
            axes.plot(milliseconds, [record[score] for record in own], marker="o", markersize=4, label=variant)
        steps = ", ".join(str(record["steps"]) for record in own)
        axes.set(xlabel=f"milliseconds per image ({steps} steps)", xscale="log")
    axes.legend(fontsize="small")
    return figure


def _by_group(variants: Sequence[str], evaluations: dict, runs: dict[tuple[str, int], Run]) -> "Figure":
    """The last held-out loss of each group over the interval of flow time that it owns."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for i, variant in enumerate(variants):
        own = [key for key in runs if key[0] == variant]
        edges = runs[own[0]].config.model_config.generation.intervals.edges
        losses = np.mean([evaluations[key][-1]["held_out_loss_per_group"] for key in own], axis=0)
        axes.stairs(losses, edges, baseline=None, color=f"C{i}", label=variant)
    axes.set(xlabel="flow time (0: noise)", title="held-out loss of the group that owns it")
    axes.legend(fontsize="small")
    return figure
