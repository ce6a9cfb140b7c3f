"""The results as a picture: every round a dot, every median a number."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from benchmarks.results import PRODUCT, Results, Spread

OUR_COLOUR: Final = "#1f5fa8"
OTHER_COLOURS: Final = ("#8a8a8a", "#b0671f")
INK: Final = "#222222"
SHORTEST: Final = 0.005
#: The height of a group's name, in rows.
HEADING: Final = 0.8
LOADS: Final = ("short transactions only", "and a client with 3 s transactions")


def draw(results: Results, path: Path) -> None:
    """Write the picture to *path*, as SVG."""
    style: dict[Any, Any] = {
        "font.size": 9,
        "font.family": "DejaVu Sans",
        "svg.hashsalt": "pg-freeze",
        "text.color": INK,
        "axes.labelcolor": INK,
    }
    rows = (len(results.procedures) + HEADING) * len(results.loads)
    with plt.rc_context(style):
        figure, (writes, reads, drains) = plt.subplots(
            1, 3, figsize=(11, 0.27 * rows + 1.1), width_ratios=(4, 4, 3), layout="constrained", facecolor="white"
        )
        for axes, title, what in ((writes, "Write gap", "write_gap"), (reads, "Read gap", "read_gap")):
            _outages(axes, results, what)
            axes.set_title(f"{title}, s", loc="left", fontsize=10, fontweight="bold")
        reads.set_yticks([])
        _drains(drains, results)
        figure.supxlabel(
            "logarithmic; a dot is one round, the bar and the number the median"
            f" — {results.clients[0]} writers, {results.clients[1]} readers, snapshot of 0.5 s",
            fontsize=8,
            color="#555555",
        )
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _outages(axes: Any, results: Results, what: str) -> None:
    y = _groups(axes, LOADS[: len(results.loads)], len(results.procedures))
    for long, ys in zip(results.loads, y, strict=True):
        for procedure, at in zip(results.procedures, ys, strict=True):
            values = [getattr(outage, what) for outage in results.of(procedure, long_transaction=long)]
            _row(axes, at, values, _colour(results, procedure))
    axes.set_yticks([at for ys in y for at in ys], [*results.procedures] * len(y))
    _sober(axes, 100)


def _drains(axes: Any, results: Results) -> None:
    procedures = results.drained_throughout
    y = _groups(axes, [name.removeprefix(f"{PRODUCT}, ") for name in procedures], len(results.session_counts))
    for procedure, ys in zip(procedures, y, strict=True):
        for count, at in zip(results.session_counts, ys, strict=True):
            values = [d.seconds for d in results.drains if d.procedure == procedure and d.sessions == count]
            _row(axes, at, values, _colour(results, procedure))
    axes.set_yticks([at for ys in y for at in ys], [f"{count}" for count in results.session_counts] * len(y))
    axes.set_title("Drain of idle sessions, s", loc="left", fontsize=10, fontweight="bold")
    _sober(axes, 30)


def _groups(axes: Any, names: Sequence[str], rows: int) -> list[list[float]]:
    """Make room for groups of so many rows, each below its name; return where the rows of each stand."""
    places = []
    for number, name in enumerate(names):
        top = number * (rows + HEADING)
        if number:
            axes.axhline(top - 0.5, color="#dddddd", linewidth=0.8)
        middle = (0, top - 0.5 + HEADING / 2)
        axes.annotate(name, middle, xycoords=("axes fraction", "data"), va="center", fontsize=8, color="#777777")
        places.append([top + HEADING + row for row in range(rows)])
    axes.set_ylim(len(names) * (rows + HEADING) - 0.5, -0.5)
    return places


def _colour(results: Results, procedure: str) -> str:
    others = [name for name in results.procedures if name not in results.ours]
    return OTHER_COLOURS[others.index(procedure)] if procedure in others else OUR_COLOUR


def _row(axes: Any, y: float, values: list[float], colour: str) -> None:
    spread = Spread.of(values)
    # What is too short for the scale stands at its edge.
    least, median, most = (max(value, SHORTEST) for value in (spread.least, spread.median, spread.most))
    axes.plot([least, most], [y, y], color=colour, linewidth=1.2, alpha=0.5)
    shown = [max(value, SHORTEST) for value in values]
    axes.plot(shown, [y] * len(values), "o", color=colour, markersize=4, alpha=0.75, markeredgewidth=0, clip_on=False)
    axes.plot([median], [y], "|", color=colour, markersize=11, markeredgewidth=1.6, clip_on=False)
    axes.annotate(
        f"{spread.median:.{2 if spread.median < 10 else 1}f}",
        (most, y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=colour,
    )


def _sober(axes: Any, longest: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(SHORTEST, longest)
    ticks = [tick for tick in (0.01, 0.1, 1, 10) if tick <= longest]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
