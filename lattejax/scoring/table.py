"""The table and the plots of scores by guidance scale and number of steps: of all that a file of results has."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from lattejax.files import write_atomically, write_with

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {"guidance": "guidance scale", "num_steps": "sampling steps"}


def write_table(out: epath.Path, results: Sequence[dict[str, Any]]) -> str:
    """Writes <out>.md with a row for each result, and two plots, <out>_by_guidance.png and <out>_by_steps.png.

    Returns the table as Markdown, in the order of guidance and steps.
    """
    results = sorted(results, key=lambda result: [result["settings"][axis] for axis in AXES])
    names = list(results[0]["figures"])
    lines = [f"| guidance | steps | {' | '.join(name.replace('_', ' ') for name in names)} |"]
    lines.append("| --- " * (len(names) + 2) + "|")
    for result in results:
        settings, cells = result["settings"], (f"{result['figures'][name]:.4g}" for name in names)
        lines.append(f"| {settings['guidance']:g} | {settings['num_steps']} | {' | '.join(cells)} |")
    reasons = dict.fromkeys(reason for result in results for reason in result["only_a_monitor_because"])
    if reasons:
        lines += ["", f"Only a monitor: {'; '.join(reasons)}."]
    table = "\n".join(lines) + "\n"
    write_atomically(out.with_suffix(".md"), table.encode())
    for suffix, axis, other in (("guidance", "guidance", "num_steps"), ("steps", "num_steps", "guidance")):
        figure = _plot(results, names, axis, other)
        path = out.with_name(f"{out.stem}_by_{suffix}.png")
        write_with(path, lambda file, figure=figure: figure.savefig(file, format="png", dpi=120))
    return table


def _plot(results: Sequence[dict[str, Any]], names: Sequence[str], axis: str, other: str) -> "Figure":
    """Every score against one setting, with a line for each value of the other."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(3.6 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for value in sorted({result["settings"][other] for result in results}):
            own = sorted(
                (result["settings"][axis], result["figures"][name])
                for result in results
                if result["settings"][other] == value
            )
            axes.plot(*zip(*own, strict=True), marker="o", markersize=4, label=f"{value:g}")
        axes.set(xlabel=AXES[axis], title=name.replace("_", " "))
    axes.legend(title=AXES[other], fontsize="small")
    return figure
